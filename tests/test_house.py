"""The house is as its docs say, and stays so."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from api.app import create
from api.problems import STATUS
from storage import errors, keys, settings
from workers import dispatcher

ROOT = Path(__file__).parent.parent
LUA = sorted((ROOT / "lua").glob("*.lua"))
ROOMS = [path for room in ("api", "storage", "workers") for path in sorted((ROOT / room).glob("*.py"))]
README = (ROOT / "README.md").read_text()
WRITES = re.compile(
    r"redis\.call\('(SET|DEL|UNLINK|PEXPIRE|H(SET|DEL|INCRBY)|Z(ADD|REM|INCRBY)|X(ADD|DEL)|[LR](PUSH|TRIM|REM))'"
)


def split(path: Path) -> tuple[list[str], str]:
    lines = path.read_text().splitlines()
    header = [line for line in lines[1:] if line.startswith("--")]
    body = lines[1 + len(header) :]
    assert lines[1 : 1 + len(header)] == header, "the header is one block below the first line"
    return header, "\n".join(body)


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.stem)
def test_a_script_says_what_it_takes_and_names_it_in_its_first_lines(path):
    header, body = split(path)
    assert path.read_text().startswith("#!lua")
    assert re.fullmatch(r"-- [A-Z].*\.", header[0].split(":")[0] + ("." if ":" in header[0] else ""))
    naming = "\n".join(line for line in body.splitlines() if line.startswith("local ") and re.search("KEYS|ARGV", line))
    for kind in ("KEYS", "ARGV"):
        told = re.findall(rf"^-- {kind}\[(\d+)\] \S+", "\n".join(header), re.MULTILINE)
        used = re.findall(rf"{kind}\[(\d+)\]", naming)
        assert told == [str(n + 1) for n in range(len(told))]
        assert sorted(set(used), key=int) == told
    assert any(line.startswith("-- Returns ") for line in header)
    rest = body.replace(naming, "")
    below = [line for line in rest.splitlines() if not line.startswith("local ")]
    assert not re.search(r"KEYS\[", "\n".join(below))


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.stem)
def test_a_script_checks_everything_before_it_writes(path):
    _, body = split(path)
    wrote = WRITES.search(body)
    refusals = [found.start() for found in re.finditer(r"return redis\.error_reply", body)]
    if wrote and refusals:
        assert max(refusals) < wrote.start()
    if "flags=no-writes" in path.read_text().splitlines()[0]:
        assert not wrote


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.stem)
def test_every_word_a_script_refuses_with_is_told_and_has_a_class(path):
    header, body = split(path)
    told = re.search(r"^-- Refuses (.*)$", "\n".join(header), re.MULTILINE)[1]
    used = re.findall(r"""error_reply\(['"]([A-Z]+) """, body)
    used = set(used) - {"ERR"}  # a call that is wrong in itself: Redis' own word, and no refusal
    assert used == (set() if told == "nothing" else set(told.split()))
    assert used <= set(errors.REFUSALS)


def test_every_refusal_has_a_status():
    assert set(STATUS) == set(errors.REFUSALS.values())


def test_every_key_and_object_is_on_the_key_page():
    page = (ROOT / "docs" / "keys.md").read_text()
    names = "feed changes gone due epoch post comments latest upload chunks uploads"
    for name in names.split():
        assert getattr(keys, name)
        assert f"| `{name}:{{p}}" in page, name
    assert "| `once:{p}:<user>:<digest>`" in page
    for made in (keys.chunk("u", "n"), keys.original("p"), keys.image("p")):
        assert f"| `{made.split('/')[0]}/" in page


def test_every_setting_is_in_the_readme():
    source = inspect.getsource(settings)
    known = set(re.findall(r'(?:get|integer)\("([A-Z_]+)"', source))
    assert known == set(re.findall(r"`IMAGEGRAM_([A-Z_]+)`", README))


def test_every_route_is_in_the_readme(tmp_path):
    app = create(settings.load({"IMAGEGRAM_DATA": str(tmp_path)}))
    table = README[README.index("## Routes") : README.index("## Settings")]
    for route in app.router.routes:
        path = "/" + re.sub(r"<(\w+)(:[^>]*)?>", r"{\1}", route.path).replace("{name}", "{post}.jpg")
        line = [line for line in table.splitlines() if f"{path}`" in line]
        assert line, path
        for method in route.methods:
            assert any(method in one for one in line), (method, path)


def test_jobs_are_named_by_a_path_that_imports():
    module, name = dispatcher.JOB.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_file_is_of_a_readable_length_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_settings_and_keys_are_named_in_one_place(path):
    text = path.read_text()
    if path.name != "settings.py":
        assert "os.environ" not in text and "getenv" not in text
    if path.name != "keys.py":
        assert not re.search(r"""f["'](feed|post|comments|latest|uploads?|chunks|due|changes|gone|once|epoch):""", text)
