"""A client in TypeScript whose types are generated from the served description: it compiles, and it works."""

import json
import subprocess

from conftest import ROOT, photograph

CLIENTS = ROOT / "tests" / "clients"
COPIED = ("app.mts", "tsconfig.json")


def test_a_program_with_generated_types_compiles_and_uses_every_part_of_the_api(serving, tmp_path):
    for name in COPIED:
        (tmp_path / name).write_text((CLIENTS / name).read_text())
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    (tmp_path / "photo.jpg").write_bytes(photograph())
    serving.worker()

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(["node", program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("node_modules/openapi-typescript/bin/cli.js", f"{serving.url}/openapi.json", "-o", "api.d.ts")
    run("node_modules/typescript/bin/tsc")
    printed = run("app.mjs", serving.url, serving.token("alice"), "photo.jpg")
    with serving.client() as client:
        listed = {post["id"]: post for post in client.get("/v1/posts").json()["items"]}
    assert set(listed) == set(json.loads(printed))
    assert {(post["caption"], post["comment_count"]) for post in listed.values()} == {
        ("By a form", 0),
        ("In pieces", 0),
    }
