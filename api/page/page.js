// Shows the description in Swagger UI.
"use strict";

function showCode() {
  const entry = document.getElementById(location.hash.slice(1));
  if (entry && entry.closest("#codes")) entry.scrollIntoView();
  return Boolean(entry);
}

// The codes are below the list of calls, which moves them down while it grows. So the browser's own jump to `#<code>`
// comes too early. It is repeated until the reader does something.
const growing = new ResizeObserver(showCode);
growing.observe(document.getElementById("calls"));
for (const action of ["wheel", "touchstart", "pointerdown", "keydown"]) {
  window.addEventListener(action, () => growing.disconnect(), { once: true });
}

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#calls",
  deepLinking: !showCode(), // it would take `#<code>` for the name of a call
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  validatorUrl: null, // by default a server in the internet checks the description
});
