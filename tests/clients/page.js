// What an app's page does with the API. tests/test_api_browser.py calls these functions in a browser.
//
//     page.html?api=http://127.0.0.1:8000&token=<JWT>
const given = new URLSearchParams(location.search)
const api = given.get('api')
const headers = { Authorization: `Bearer ${given.get('token')}` }

// One call: the status, the body, and the headers that the browser lets the page read.
async function call(method, path, body, more = {}) {
  const json = body && { 'Content-Type': 'application/json' }
  const answer = await fetch(api + path, {
    method, headers: { ...headers, ...json, ...more }, body: body && JSON.stringify(body),
  })
  const text = await answer.text()
  return { status: answer.status, headers: Object.fromEntries(answer.headers), body: text ? JSON.parse(text) : null }
}

// Uploads the chosen file, or resumes its upload. Resolves to the upload's id and the offset at which it began.
function upload() {
  return new Promise((resolve, reject) => {
    let offset = 0
    const sending = new tus.Upload(document.querySelector('input').files[0], {
      endpoint: `${api}/v1/uploads`,
      headers,
      retryDelays: [0, 500],
      metadata: { filename: 'photo.jpg' },
      onAfterResponse: (request, answer) => {
        if (request.getMethod() === 'HEAD') offset = Number(answer.getHeader('Upload-Offset'))
      },
      onError: reject,
      onSuccess: () => resolve({ id: sending.url.split('/').pop(), offset }),
    })
    sending.findPreviousUploads().then((previous) => {
      if (previous.length) sending.resumeFromPreviousUpload(previous[0])
      sending.start()
    })
  })
}

// Shows a picture, and resolves to the colour in its middle if the page may read it.
async function show(path, crossOrigin) {
  const image = new Image()
  if (crossOrigin) image.crossOrigin = 'anonymous'
  image.src = api + path
  await image.decode()
  const canvas = document.createElement('canvas')
  canvas.width = canvas.height = 600
  const drawing = canvas.getContext('2d')
  drawing.drawImage(image, 0, 0)
  return Array.from(drawing.getImageData(300, 300, 1, 1).data)
}
