"""Prints a bill of materials of the servers as CycloneDX: `python -m deploy.sbom`, or `make sbom`.

It has each Python package that `make run` installs, with its version, its licence and the hashes of its files. Versions
and licences are those of this Python's environment, hashes those of requirements.lock. System packages, such as
libseccomp2, are not in it.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

LOCK = Path(__file__).parent.parent / "requirements.lock"
PROJECT = "imagegram"


def normalized(name: str) -> str:
    """A name as requirements.lock writes it: https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, list[str]]:
    """The SHA-256 hashes of each package of the servers: those of the section `run`, and pillow-simd."""
    wanted = text.partition("\n# test")[0].splitlines() + text.partition("\n# compiled\n")[2].splitlines()
    rows = (line.split("==") for line in wanted if "==" in line)
    return {normalized(name): re.findall(r"--hash=sha256:(\w+)", rest[-1]) for name, *rest in rows}


def bill() -> dict:
    options = ["--output-reproducible", "--no-validate"]  # the tests validate the result, which takes seconds
    command = [sys.executable, "-m", "cyclonedx_py", "environment", *options, sys.executable]
    document = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    hashes, components = locked(LOCK.read_text()), []
    for component in document["components"]:
        name = normalized(component["name"])
        if name in hashes:
            files = [{"alg": "SHA-256", "content": digest} for digest in hashes[name]]
            # A reference, because a package has several files, and one of them is installed.
            reference = {"type": "distribution", "url": component["purl"], "hashes": files}
            component.setdefault("licenses", [{"license": {"name": metadata(name)["License"]}}])
            components.append({**component, "externalReferences": [reference]})
        elif name == PROJECT:
            project = {key: component[key] for key in ("bom-ref", "licenses", "name", "version")}
            document["metadata"]["component"] = {**project, "type": "application"}
    document["components"] = components
    known = {component["bom-ref"] for component in components} | {project["bom-ref"]}
    document["dependencies"] = [
        {**row, "dependsOn": [ref for ref in row.get("dependsOn", ()) if ref in known]}
        for row in document["dependencies"]
        if row["ref"] in known
    ]
    return document


if __name__ == "__main__":
    print(json.dumps(bill(), indent=1))
