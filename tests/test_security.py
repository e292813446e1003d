"""docs/security.md is true: its tests exist, each risk has one, licences are allowed, and the SBOM is valid."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from test_house import LOCK, SETUP, rows

PAGE = (ROOT / "docs" / "security.md").read_text()
# What packages declare instead of an SPDX expression: in their classifiers, or as text
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache License 2.0": "Apache-2.0",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: Public Domain": "Unlicense",
}


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)
    assert len(named) > 30
    for file, name in named:
        functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
        names = {node.name for node in functions if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in names, f"{file}::{name}"


def test_each_of_the_ten_risks_has_a_measure_and_a_test():
    table = rows(PAGE, "## OWASP API Security Top 10\n")
    assert [risk.split()[0] for risk, _, _ in table] == [f"API{number}" for number in range(1, 11)]
    assert all(measure and "::" in proof for _, measure, proof in table)


@pytest.fixture(scope="module")
def bill() -> str:
    command = [sys.executable, "-m", "deploy.sbom"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_bill_of_materials_has_every_package_of_the_servers_with_version_licence_and_hashes(bill):
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    document = json.loads(bill)
    assert document["metadata"]["component"]["name"] == "imagegram"
    found = {part["name"].lower().replace("_", "-"): part for part in document["components"]}
    required = SETUP["options"]["install_requires"] + SETUP["options.extras_require"]["trace"]
    wanted = {re.match(r"[\w.-]+", line)[0].lower() for line in required.split()} - {"pillow"}
    assert wanted <= found.keys() and found.keys() & {"pillow", "pillow-simd"}
    assert not found.keys() & {"pytest", "fastapi"}
    for name, part in found.items():
        (files,) = [reference["hashes"] for reference in part["externalReferences"]]
        assert part["version"] and part["licenses"] and files
        line = next(line for line in LOCK.splitlines() if line.lower().startswith(f"{name.replace('.', '-')}=="))
        assert all(f"--hash=sha256:{file['content']}" in line for file in files)
    assert str(ROOT) not in bill


def test_every_package_of_the_servers_has_an_allowed_licence(bill):
    allowed = set(re.findall(r"`([\w.-]+)`", "".join(row[0] for row in rows(PAGE, "## Dependencies"))))
    used = set()
    for part in json.loads(bill)["components"]:
        for entry in part["licenses"]:
            declared = entry.get("expression") or entry["license"].get("id") or entry["license"]["name"]
            for needed in SPDX.get(declared, declared).replace("(", "").replace(")", "").split(" AND "):
                choice = set(needed.split(" OR ")) & allowed
                assert choice, f"{part['name']}: {declared}"
                used |= choice
    assert used | {"MIT-CMU"} == allowed, "the page has no licence that nothing uses; MIT-CMU is that of Pillow"
