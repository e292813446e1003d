"""The measurements as tables in Markdown."""

from statistics import median

from tests.line.emulator import PROFILES
from tests.line.plan import BEST, CONTROLS, MEASURED, READY, SENDING, WAYS, middle
from tests.line.site import PICTURES

Found = dict[tuple, list[dict]]  # by the name of a task, what client.py reported for each seed


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


HTTP = {
    "1.1": f"{BEST}, HTTP/1.1",
    "2": BEST,
    "3": f"{BEST}, HTTP/3",
    "3, early data": f"{BEST}, HTTP/3, comes back",
}
EVENTS = {"feed": "feed", "first look of all ten": "seen", "first three whole": "top", "all ten whole": "whole"}


def protocols(found: Found) -> str:
    rows = []
    for profile in MEASURED:
        for name, way in HTTP.items():
            for congestion in CONTROLS:
                if runs := found.get(("read", profile, congestion, way)):
                    cells = [middle(runs, kind) for kind in EVENTS.values()]
                    words = [f"{seconds:.1f} s, {size / 1000:.0f} kB" for seconds, size in cells]
                    rows.append([profile, name, "nginx's" if name.startswith("3") else congestion, *words])
    return table(["line", "HTTP", "congestion control", *EVENTS], rows)


def ways(found: Found) -> str:
    rows = []
    for way in WAYS:
        cells = []
        for profile in MEASURED:
            for congestion in CONTROLS:
                runs = found.get(("read", profile, congestion, way))
                times = [middle(runs, kind)[0] for kind in list(EVENTS.values())[1:]] if runs else []
                cells.append(" / ".join(f"{seconds:.1f}" for seconds in times))
        rows.append([way, *cells])
    return table(["way", *(f"{profile}, {congestion}" for profile in MEASURED for congestion in CONTROLS)], rows)


def seconds(found: Found, *name: str) -> float:
    return median(run["seconds"] for run in found["send", *name])


def sending(found: Found) -> str:
    rows = []
    for way, (_, _, also_bbr) in SENDING.items():
        controls = CONTROLS[: 1 + also_bbr]
        cells = {(p, c): f"{seconds(found, p, c, way):.0f}" for p in MEASURED for c in controls}
        rows.append([way, *(cells.get((p, c), "") for p in MEASURED for c in CONTROLS)])
    return table(["3 MB", *(f"{profile}, {control}, s" for profile in MEASURED for control in CONTROLS)], rows)


def heard(found: Found, profile: str, way: str) -> tuple[float, float, int]:
    """Median of seconds, median and most of requests."""
    pairs = [pair for run in found["ready", profile, way] for pair in run["heard"]]
    requests = [count for _, count in pairs]
    return median(second for second, _ in pairs), median(requests), max(requests)


def ready(found: Found) -> str:
    rows = []
    for way, words in zip(READY, ("`Prefer: wait=25`", "asks again after `Retry-After`"), strict=True):
        cells = [heard(found, profile, way) for profile in MEASURED]
        rows.append([words, *(f"{taken:.2f} s, {requests:.0f} (at most {most})" for taken, requests, most in cells)])
    return table(["from 201 to ready: seconds, requests", *MEASURED], rows)


def targets(found: Found) -> str:
    look = middle(found["read", "EDGE", "cubic", BEST], "seen")[0]
    together = "all ten at once", "all ten at once, Pillow's JPEGs"
    now, before = (middle(found["read", "EDGE", "cubic", way], "whole")[0] for way in together)
    ways_to_send = "tus, one PATCH", "tus, four parts, four connections"
    one, four = (seconds(found, "wifi", "cubic", way) for way in ways_to_send)
    taken, requests, _ = heard(found, "3G", "wait")
    rows = [
        ["EDGE, cubic, HTTP/2: first look of all ten pictures", f"{look:.1f} s", "≤ 5 s", met(look, 5)],
        ["EDGE, cubic, HTTP/2: all whole ÷ Pillow's JPEGs", f"{now / before:.2f}", "≤ 0.86", met(now / before, 0.86)],
        ["wifi, cubic: four parts ÷ one PATCH", f"{four / one:.2f}", "≤ 0.5", met(four / one, 0.5)],
        ["3G: from 201 to ready, seconds", f"{taken:.2f} s", "≤ 0.7 s", met(taken, 0.7)],
        ["3G: from 201 to ready, requests", f"{requests:.0f}", "1", met(requests, 1)],
    ]
    return table(["what", "value", "target", "met"], rows)


def curves(found: Found) -> dict[str, dict[str, list[float]]]:
    """By line and label the seconds until the first picture was there, the second, and so on: medians.

    The front sends with BBR, as it is deployed. The plain peer sends with cubic, as Linux does by default.
    """
    chosen = {
        "Imagegram: first look of a picture": (BEST, "bbr", "seen"),
        "Imagegram: whole picture": (BEST, "bbr", "whole"),
        "Imagegram without first looks: whole picture": ("two at a time", "bbr", "whole"),
        "the plain peer: whole picture": ("the plain peer", "cubic", "whole"),
    }
    return {
        f"{profile}: {PROFILES[profile].words()}": {
            label: [middle(found["read", profile, congestion, way], kind, number)[0] for number in range(PICTURES)]
            for label, (way, congestion, kind) in chosen.items()
        }
        for profile in MEASURED
    }


def met(value: float, most: float) -> str:
    return "yes" if value <= most else "**no**"


def page(found: Found) -> str:
    return "\n".join([targets(found), protocols(found), ways(found), sending(found), ready(found)])
