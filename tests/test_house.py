"""The docs and the code agree: headers of scripts, refusals, keys, settings, routes, requirements, imports.

Nothing here judges style or the length of files.
"""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import application

from api import description
from api.problems import STATUS
from api.protocol import TAKE_A_BODY
from storage import check, errors, keys, metrics, settings
from storage.db import client
from workers import dispatcher
from workers.errors import SENTENCES

ROOT = Path(__file__).parent.parent
SHARED = ROOT / "lua" / "shared.lua"
SCRIPTS = sorted(path for path in (ROOT / "lua").glob("*.lua") if path != SHARED)
CLIENT = ROOT / "api" / "client"
MODULES = [path for package in ("api", "storage", "workers") for path in sorted((ROOT / package).rglob("*.py"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
KEYS = (ROOT / "docs" / "keys.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
NOT_IMPORTED = {"swagger-ui-py"}  # distributions of which only files are served
# Distributions whose module has another name
DISTRIBUTION_MODULES = {"pillow": "PIL", "pyjwt": "jwt", "pyyaml": "yaml", "tuspy": "tusclient"}

# Commands that only read. Every other command counts as a write: a script that uses a new one fails until it is here.
READS = re.compile(
    "DBSIZE|EXISTS|TTL|TIME|TYPE|GET|HGET|HGETALL|HKEYS|HLEN|HMGET|HVALS|INFO|LINDEX|LLEN|LRANGE|SCAN|SCARD|SISMEMBER|SMEMBERS|XINFO|XLEN|XRANGE|XREVRANGE|"
    "ZCARD|ZCOUNT|ZRANGE|ZRANGEBYSCORE|ZREVRANGE|ZREVRANGEBYLEX|ZREVRANGEBYSCORE|ZREVRANK|ZSCAN|ZSCORE"
)
TEXT = {"", ".py", ".lua", ".md", ".js", ".sql", ".sh", ".conf", ".yml", ".cfg"}


def each(paths):
    """Run a test once for each path. The test's id is the path without its ending."""
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT).with_suffix("")))


def walk(path: Path):
    """All nodes of a module's syntax tree."""
    return ast.walk(ast.parse(path.read_text()))


def split(path: Path) -> tuple[str, str, str]:
    """The parts of a script: its header, the lines that name its keys and arguments, and the rest."""
    lines = path.read_text().splitlines()
    assert re.fullmatch(r"#!lua( flags=(no-writes(,allow-cross-slot-keys)?|allow-oom))?", lines[0])
    parts = [], [], lines[1:]
    for part, begin in (parts[0], "--"), (parts[1], "local "):
        while parts[2] and parts[2][0].startswith(begin):
            part.append(parts[2].pop(0))
    return tuple("\n".join(part) for part in parts)


def rows(page: str, heading: str = "") -> list[list[str]]:
    """The cells of all tables in the section with this heading, row by row, without the rows that name the columns."""
    section = page[page.index(heading) + len(heading) :].split("\n## ")[0].splitlines()
    body = [line for line, below in zip(section, [*section[1:], ""], strict=True) if not below.startswith("|--")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in body if line.startswith("| ")]


# The functions of lua/shared.lua: name -> parameters and body
FUNCTIONS = dict(re.findall(r"^local function (\w+)(\(.*?^end)$", SHARED.read_text(), re.MULTILINE | re.DOTALL))
WRITERS = {"add_entry", "append_comment", "remove_comment", "take"}  # those that write


def writes(body: str) -> list[int]:
    """The positions at which a script calls a command that is not in READS, or a shared function that writes."""
    calls = re.finditer(r"redis\.p?call\((?:'([A-Z]+)')?", body)
    found = [call.start() for call in calls if not READS.fullmatch(call[1] or "")]
    return found + [call.start() for call in shared_calls(body) if call[1] in WRITERS]


def shared_calls(body: str) -> list[re.Match]:
    """The calls of functions of lua/shared.lua in a script. Group 1 of a match is the function's name."""
    return list(re.finditer(rf"\b({'|'.join(FUNCTIONS)})\(", body))


def words(text: str) -> set[str]:
    """The words of the refusals in a text. Checks that each refusal is returned and begins with a literal word."""
    refusals = re.findall(r"""return redis\.error_reply\(['"]([A-Z]+) """, text)
    assert len(refusals) == text.count("error_reply(")
    return set(refusals)


# Lua


@each(SCRIPTS)
def test_a_scripts_header_lists_its_keys_and_arguments_and_its_first_lines_name_them(path):
    header, naming, body = split(path)
    assert re.match(r"-- [A-Z][^.]*[.:]", header), "the header begins with a sentence"
    for kind in ("KEYS", "ARGV"):
        listed = re.findall(rf"^-- {kind}\[(\d+)\] \S+", header, re.MULTILINE)
        assert listed == [str(n + 1) for n in range(len(listed))]
        # A script for which their number differs from call to call names the whole list.
        named = set(re.findall(rf"{kind}\[(\d+)\]", naming))
        assert named == set(listed) or re.search(rf"= .*\b{kind}\b(?!\[)", naming)
    assert not re.search(r"(KEYS|ARGV)\[", body)
    assert re.search(r"^-- Returns ", header, re.MULTILINE)


@each(SCRIPTS)
def test_a_scripts_header_has_the_patterns_and_types_of_the_key_page(path):
    header, _, _ = split(path)
    types = {row[0].strip("`").split(":{")[0]: row[1] for row in rows(KEYS)}
    for number, name, pattern, kind in re.findall(
        r"^-- KEYS\[(\d+)\]\s+(\w+)\s+(\S+)\s+(\w+)", header, re.MULTILINE
    ):
        word, _, rest = pattern.partition(":{p}")
        assert (name, rest) in ((word, ""), (word, ":<id>"), (word, ":<user>"), (word, ":…")), number
        assert kind == types[word]


@each(SCRIPTS)
def test_a_script_builds_no_key_and_increments_nothing(path):
    _, _, body = split(path)
    assert not re.search(r"""['"]\w+:""", body)
    assert not re.search(r"'(Z|H)?INCRBY'", body)


@each(SCRIPTS)
def test_a_script_checks_everything_before_it_writes(path):
    _, _, body = split(path)
    refusals = [found.start() for found in re.finditer(r"redis\.error_reply", body)]
    for call in shared_calls(body):
        if words(FUNCTIONS[call[1]]):
            refusals.append(call.start())
            returned = rf"local (\w+) = .*\b{call[1]}\(.*\n *if \1 then\n *return \1\n"
            assert re.search(returned, body), f"what {call[1]} refuses is not returned at once"
    assert max(refusals, default=0) < min(writes(body), default=len(body))


@each(SCRIPTS)
def test_exactly_the_scripts_without_writes_have_the_flag_no_writes(path):
    first = path.read_text().splitlines()[0]
    assert ("flags=no-writes" in first) == (not writes(split(path)[2]))


@each(SCRIPTS)
def test_the_words_that_a_script_refuses_with_are_in_its_header_and_have_a_class(path):
    header, _, body = split(path)
    listed = re.search(r"^-- Refuses (.*)$", header, re.MULTILINE)[1].split()
    used = words(body).union(*(words(FUNCTIONS[call[1]]) for call in shared_calls(body)))
    used -= {"ERR"}  # wrong arguments: a fault of the caller, and no refusal
    assert (listed == ["nothing"]) == (not used)
    assert used == set(listed) - {"nothing"}
    assert used <= set(errors.REFUSALS)


def test_shared_functions_only_read_but_for_one_and_several_scripts_call_each():
    """None calls another one: Lua would create it with an upvalue, which makes each call of a script slower."""
    outside = re.sub(r"^local function .*?^end$", "", SHARED.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert all(line.startswith("--") for line in outside.splitlines() if line)
    for name, body in FUNCTIONS.items():
        assert bool(writes(body)) == (name in WRITERS) and not shared_calls(body), name
        assert sum(f"{name}(" in path.read_text() for path in SCRIPTS) > 1, name


@each(SCRIPTS)
def test_a_script_is_sent_with_the_shared_functions_behind_its_first_line(path):
    first, rest = path.read_text().split("\n", 1)
    assert client.SCRIPTS[path.stem].text == f"{first}\n{SHARED.read_text()}\n{rest}"
    assert "shared" not in client.SCRIPTS


# Refusals and statuses


def test_every_refusal_has_a_status():
    assert set(STATUS) == set(errors.REFUSALS.values())


def test_every_reason_for_a_failed_post_is_described():
    in_lua = set(re.findall(r"'code', '(\w+)'", (ROOT / "lua" / "start_image.lua").read_text()))
    assert in_lua == {"exhausted"}
    code = description.load()["components"]["schemas"]["Failure"]["properties"]["code"]
    assert set(code["enum"]) == set(code["x-meanings"]) == in_lua | set(SENTENCES)


def test_workers_fail_a_post_only_with_a_code_that_has_a_sentence():
    """They create faults only by `unusable`, so that no text of a library reaches clients."""
    used = set()
    for path in sorted((ROOT / "workers").glob("*.py")):
        for call in (node for node in walk(path) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))  # of a plain call, or of `module.name()`
            if name == "unusable":
                used |= {part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)}
            # errors.unusable() itself, and the sandbox, which creates the decoder's fault again in the job
            assert name != "Unusable" or path.name in ("errors.py", "sandbox.py"), path
    assert used == set(SENTENCES)


# Keys, objects, settings, routes


def test_the_key_page_lists_exactly_the_keys_and_objects_that_keys_py_names():
    templates = [node.values[0] for node in walk(Path(keys.__file__)) if isinstance(node, ast.JoinedStr)]
    beginnings = [re.match(r"\w+(:\{|/)", part.value) for part in templates if isinstance(part, ast.Constant)]
    named = {beginning[0] for beginning in beginnings if beginning}
    documented = {re.match(r"`(\w+(?::\{|/)|rq:)", row[0])[1] for row in rows(KEYS) + rows(KEYS, "## Objects")}
    assert len(named) > 10, "the search for names still works"
    assert documented == named | {"rq:"}


def test_check_expects_the_types_that_the_key_page_lists():
    documented = {row[0].strip("`").split(":{")[0]: row[1] for row in rows(KEYS) if row[0] != "`rq:*`"}
    assert documented == check.TYPES


def test_the_readme_lists_exactly_the_settings_that_exist_with_their_defaults():
    calls = [node for node in walk(Path(settings.__file__)) if isinstance(node, ast.Call)]
    readers = ("get", "integer", "one_of", "store", "redis", "address")
    read = [call.args for call in calls if isinstance(call.func, ast.Name) and call.func.id in readers]
    defaults = {name.value: default for name, default, *_ in read if isinstance(name, ast.Constant)}
    documented = {}
    for first, default, *_ in rows(README, "## Settings"):
        names = re.findall(r"`IMAGEGRAM_([A-Z_]+)`", first)
        documented.update(zip(names, default.split(", ") if len(names) > 1 else [default], strict=True))
    assert set(documented) == set(defaults)
    for name, default in defaults.items():
        if isinstance(default, ast.Name):
            value = getattr(settings, default.id, "")
        else:
            value = default.value if isinstance(default, ast.Constant) else ""
        if value != "":
            assert documented[name].strip("`").removeprefix("./") == str(value), name


def test_every_setting_that_any_file_names_exists():
    known = set(re.findall(r"`IMAGEGRAM_([A-Z_]+)`", README))
    for path in text_files():
        for name in re.findall(r"IMAGEGRAM_([A-Z_]*[A-Z])", path.read_text()):
            assert name in known, (path.name, name)


def served_routes() -> set[tuple[str, str]]:
    """The method and the path of every route, with the README's names of its parameters."""
    served = set()
    for route in application().router.routes:
        path = "/" + re.sub(r"<(\w+)(:[^>]*)?>", r"{\1}", route.path).replace("{name}", "{post}.jpg")
        served |= {(method, path) for method in route.methods}
    return served


def test_the_readme_lists_exactly_the_routes_that_are_served():
    documented = set()
    for first, _ in rows(README, "## Routes"):
        path = ""
        for method, named in re.findall(r"`([A-Z]+)(?: (/[^`]*))?`", first):
            path = named or path
            documented.add((method, path))
    assert documented == served_routes()


def test_every_path_that_takes_get_takes_head():
    served = served_routes()
    assert {("HEAD", path) for method, path in served if method == "GET"} <= served


def test_every_handler_that_reads_a_body_streams_it():
    """Sanic reads the body before it calls a handler that does not stream. Then the token would be checked too late."""
    for route in application().router.routes:
        if route.methods & TAKE_A_BODY:
            assert hasattr(route.handler, "is_stream"), route.path
        assert route.methods <= TAKE_A_BODY | {"GET", "HEAD", "OPTIONS", "DELETE"}, route.path


# Metrics


def test_the_metrics_page_lists_exactly_the_metrics_that_exist():
    documented = {}
    for heading in re.findall("^## .*$", METRICS, re.MULTILINE):
        for name, kind, labels, parts, _meaning, _action in rows(METRICS, heading):
            documented[name.strip("`")] = kind, tuple(re.findall(r"`(\w+)`", labels)), parts.split(", ")
    defined = {metric.name: (metric.kind, metric.labels, metric.parts.split()) for metric in metrics.METRICS.values()}
    assert documented == defined


def test_the_name_of_a_metric_says_what_it_is():
    """https://prometheus.io/docs/practices/naming/"""
    for name, metric in metrics.METRICS.items():
        assert re.fullmatch(r"imagegram_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert bool(metric.buckets) == (metric.kind == "histogram"), name


# Packages


def test_the_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def imported_modules(paths) -> set[str]:
    """The full names of all modules that these files import, except those of Python's library."""
    imported = set()
    for node in (node for path in paths for node in walk(path)):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    return {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("requirements", "paths"),
    [
        (SETUP["options"]["install_requires"], [path for path in MODULES if CLIENT not in path.parents]),
        (SETUP["options.extras_require"]["client"], sorted(CLIENT.glob("*.py"))),
    ],
    ids=["the servers", "the client"],
)
def test_exactly_the_required_distributions_are_imported(requirements, paths):
    required = {re.match(r"[\w.-]+", line)[0].lower() for line in requirements.split("\n")[1:]}
    modules = {DISTRIBUTION_MODULES.get(name, name.replace("-", "_")) for name in required - NOT_IMPORTED}
    elsewhere = {"api", "storage", "workers", "opentelemetry"}  # which only the extra `trace` has
    assert modules == {name.split(".")[0] for name in imported_modules(paths)} - elsewhere


def test_the_client_imports_nothing_of_the_servers_and_they_nothing_of_it():
    for path in MODULES:
        for name in imported_modules([path]):
            if name.startswith("api"):
                assert name.startswith("api.client") == (CLIENT in path.parents), (path, name)
            assert CLIENT not in path.parents or not name.startswith(("storage", "workers"))


def test_the_lock_pins_every_requirement_with_hashes_in_the_section_where_setup_installs_it():
    """Names are compared as pip compares them."""
    sections = {}
    for line in LOCK.splitlines()[1:]:
        if line.startswith("# "):
            section = sections[line[2:]] = set()
            continue
        pattern = r"([a-z\d.-]+)==[\w.]+( ; [^;#\\]+)?( --hash=sha256:[0-9a-f]{64})+"
        section.add(re.fullmatch(pattern, line)[1].replace(".", "-"))
    assert list(sections) == ["run", "test", "bench", "compiled"] and sections["compiled"] == {"pillow-simd"}
    extras = dict(SETUP["options.extras_require"])
    required = {"test": extras.pop("test"), "bench": extras.pop("bench")}
    required["run"] = "".join([SETUP["options"]["install_requires"], *extras.values()])
    for name, text in required.items():
        found = set().union(*(sections[one] for one in ("run", "test", "bench")[: 1 + list(sections).index(name)]))
        assert {re.match(r"[\w.-]+", line)[0].lower() for line in text.split()} <= found, name


def test_setup_cfg_lists_every_package():
    """A package that is not listed would be missing in the wheel."""
    packages = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in MODULES}
    assert set(SETUP["options"]["packages"].split(", ")) == packages | {"lua"}


def test_jobs_are_named_by_paths_that_import():
    """RQ imports a job by the name in its queue: a wrong one would only fail in a worker."""
    jobs = set()
    for path in MODULES:
        for node in walk(path):
            if isinstance(node, ast.Constant) and re.fullmatch(r"(api|storage|workers)(\.\w+){2,}", str(node.value)):
                jobs.add(node.value)
    assert dispatcher.JOB in jobs
    for job in jobs:
        module, _, name = job.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


@each(MODULES)
def test_a_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_examples_in_docstrings_are_true():
    examples = 0
    for path in MODULES:
        if ">>>" in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            result = doctest.testmod(module)
            assert not result.failed, path
            examples += result.attempted
    assert examples


def text_files() -> list[Path]:
    """The project's text files, without what tools have written beside them."""
    folders = ["api", "storage", "lua", "workers", "tests", "docs", "deploy", ".ci", ".github"]
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    written_by_tools = {"node_modules", "__pycache__", "out"}
    return [
        path
        for path in paths
        if path.suffix in TEXT and path.is_file() and not written_by_tools & set(path.relative_to(ROOT).parts)
    ]


# The client runs on other machines than the servers, and has settings of its own.
SETTINGS_FILES = [ROOT / "storage" / "settings.py", CLIENT / "settings.py"]


@each([path for path in MODULES if path not in SETTINGS_FILES])
def test_only_settings_py_reads_the_environment(path):
    for node in walk(path):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        assert not (isinstance(node, ast.ImportFrom) and node.module == "os")


@each([path for path in MODULES if path.name != "keys.py"])
def test_only_keys_py_names_keys_and_objects(path):
    names = {re.match(r"`(\w+)", row[0])[1] for row in rows(KEYS) + rows(KEYS, "## Objects")}
    for node in walk(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.match(rf"({'|'.join(names)})(:|/)", node.value), node.lineno


@each(PAGES)
def test_the_links_of_a_page_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert not target.startswith("/")
        assert "://" in target or (path.parent / target).exists(), target
