"""`imagegram`, or `python -m api.client`: use a site that is far away, over a line that breaks.

    imagegram login https://example.org          asks for a token, checks it and stores both
    imagegram upload photo.jpg --caption Hello   publishes a picture; the same command again continues it
    imagegram feed                               lists the posts with the most comments
    imagegram show POST                          one post and its comments
    imagegram picture POST [FILE]                loads its picture, a first look first
    imagegram comment POST TEXT                  adds a comment
    imagegram delete POST [COMMENT]              deletes a post or a comment of yours
    imagegram watch                              prints what changes, until Ctrl-C
    imagegram logout                             forgets address and token

A token is never an argument: other users of the machine can see those. `login` reads it from a prompt or from stdin.
Scripts set IMAGEGRAM_URL and IMAGEGRAM_TOKEN instead.

status  means
0       done
1       refused, or the picture could not be made: the same command fails again
2       the command, a file or the login cannot be used
3       the site was not reached or was too busy for as long as --patience says: the same command may succeed later
130     Ctrl-C
"""

import argparse
import getpass
import math
import shlex
import sys
from pathlib import Path
from urllib.parse import quote

from api.client import pictures, printing, settings
from api.client.calls import Refused, Site, Unreachable, rest
from api.client.printing import comment_text, note, post_text, show, show_json
from api.client.records import record
from api.client.settings import Login, Unusable

REFUSED, UNUSABLE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
# Seconds without success after which a command gives up. An upload may sit in a tunnel; `watch` goes on until Ctrl-C.
PATIENCE = {"login": 10, "upload": 600, "watch": math.inf}
USUAL_PATIENCE = 60


def connect(given, note=note) -> tuple[Site, Login]:
    login = settings.read_login()
    return Site(login.url, login.token, given.patience, note), login


def login(given) -> None:
    url = given.url or settings.variable("URL")
    if not url:
        if not sys.stdin.isatty():
            raise Unusable("say which site: imagegram login URL")
        url = input("Address of the site: ")
    url = settings.normalise(url)
    token = getpass.getpass("Token: ") if sys.stdin.isatty() else sys.stdin.readline()
    token = settings.check_token(token.strip())
    if not token:
        raise Unusable("no token was given")
    Site(url, token, given.patience, note).call("GET", "/v1/uploads")  # answered only with a valid token
    login = Login(url, token)
    settings.write_login(login)
    if url.startswith("http:") and not url.startswith(("http://127.", "http://localhost", "http://[::1]")):
        note("warning: without https, everybody on the way can read the token")
    if given.json:
        show_json({"url": url, "user": login.user or None})
    else:
        show(f"logged in at {url}" + (f" as {login.user}" if login.user else ""))


def logout(given) -> None:
    try:
        settings.login_file().unlink(missing_ok=True)
    except OSError as error:
        raise Unusable(f"{settings.login_file()} cannot be deleted: {settings.reason(error)}") from None
    show_json({"url": None, "user": None}) if given.json else show("logged out")


def upload(given) -> int:
    from api.client import uploading  # not at the top: tuspy takes 0.3 s, and only this command needs it

    bar = printing.Bar()
    site, login = connect(given, bar.note)
    try:
        with bar.shown():
            post = uploading.upload(site, login.owner, Path(given.file), given.caption, given.again, bar)
        post = uploading.wait_until_ready(site, post)
    except KeyboardInterrupt:
        again = shlex.join(["imagegram", *(word for word in sys.argv[1:] if word != "--again")])
        note(f"stopped at {bar.offset} of {bar.size} bytes. The same command goes on from there: {again}")
        return INTERRUPTED
    show_json(post) if given.json else show(post_text(post, site.url))
    return REFUSED if post["status"] == "failed" else 0


def pages(site: Site, path: str, given):
    """Yields the pages of a list: one, or with --all each until the last."""
    parameters = {"limit": given.limit} | ({"cursor": given.cursor} if given.cursor else {})
    while True:
        page = site.call("GET", path, params=parameters).json()
        yield page
        if not given.all or not page["next"]:
            return
        parameters["cursor"] = page["next"]


def feed(given) -> None:
    site, _ = connect(given)
    for page in pages(site, "/v1/posts", given):
        if given.json and not given.all:
            show_json({"items": page["items"], "next": page["next"]})
            continue
        for post in page["items"]:
            show_json(post) if given.json else show(post_text(post, site.url))
    if page["next"] and not given.json:
        note(f"There is more: imagegram feed --limit {given.limit} --cursor {page['next']}")


def show_post(given) -> None:
    site, _ = connect(given)
    path = f"/v1/posts/{quote(given.post, safe='')}"
    post = site.call("GET", path).json()
    if not given.json:
        show(post_text(post, site.url))
    comments = []
    for page in pages(site, f"{path}/comments", given):
        comments += page["items"]
        if not given.json:
            for comment in page["items"]:
                show(comment_text(comment))
    if given.json:
        show_json({"post": post, "comments": {"items": comments, "next": page["next"]}})
    elif page["next"]:
        note(f"There are more comments: imagegram show {shlex.quote(given.post)} --cursor {page['next']}")


def picture(given) -> None:
    site, _ = connect(given)
    image = site.call("GET", f"/v1/posts/{quote(given.post, safe='')}").json()["image"]
    if not image:
        raise Refused(404, "noimage", "this post has no picture, or not yet")
    file = Path(given.file or f"{given.post}.jpg")
    loaded = pictures.fetch(site, image, file, given.look)
    length = image.get("bytes", loaded)
    if given.json:
        show_json({"file": str(file), "bytes": loaded, "of": length})
    else:
        show(f"{file}  {loaded} of {length} bytes")


def comment(given) -> None:
    site, login = connect(given)
    # The key is on disk before the comment is sent. So also a command that was killed, or that gave up without knowing
    # whether the comment was added, can be repeated.
    with record("comment", site.url, login.owner, given.post, given.text) as known:
        path = f"/v1/posts/{quote(given.post, safe='')}/comments"
        try:
            added = site.call("POST", path, known.fields["key"], json={"text": given.text}).json()
        except Refused:
            known.forget()
            raise
        known.forget()
    show_json(added) if given.json else show(comment_text(added))


def delete(given) -> None:
    site, _ = connect(given)
    path = f"/v1/posts/{quote(given.post, safe='')}"
    if given.comment is not None:  # an empty one, as of a script's empty variable, must not delete the post
        path += f"/comments/{quote(given.comment, safe='')}"
    site.call("DELETE", path)
    show_json({"id": given.comment or given.post, "deleted": True}) if given.json else show("deleted")


def watch(given) -> None:
    site, _ = connect(given)
    since = ""
    while True:
        try:
            answer = site.wait("/v1/changes", params={"since": since} if since else {})
        except Refused as refusal:
            if refusal.code != "outdated":
                raise
            note(f"{refusal}. Changes may be missing; see: imagegram feed")
            since = ""
            continue
        changes = answer.json()
        if not since:
            note(f"watching {site.url}")
        elif not changes["items"] and not changes["more"]:
            rest(answer)
        for post in changes["items"]:
            if given.json:
                show_json(post)
            else:
                show(f"{post['id']}  deleted" if post.get("deleted") else post_text(post, site.url))
        since = changes["next"]


def patience(text: str) -> float:
    seconds = float(text)
    if not seconds >= 0:
        raise ValueError
    return seconds


def read_arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON: one document, or one a line")
    common.add_argument("--patience", type=patience, metavar="SECONDS", help="give up after so long without success")
    paged = argparse.ArgumentParser(add_help=False)
    paged.add_argument("--limit", type=int, default=20, help="entries of a page, 1 to 100")
    paged.add_argument("--cursor", default="", help="where the page begins: `next` of the page before")
    paged.add_argument("--all", action="store_true", help="all pages to the end")
    parser = argparse.ArgumentParser(
        prog="imagegram", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[common, *parents])
        command.set_defaults(run=run)
        return command

    add("login", login).add_argument("url", nargs="?", help="address of the site")
    add("logout", logout)
    command = add("upload", upload)
    command.add_argument("file")
    command.add_argument("--caption", default="")
    command.add_argument("--again", action="store_true", help="publish a file once more that was published already")
    add("feed", feed, paged)
    add("show", show_post, paged).add_argument("post")
    command = add("picture", picture)
    command.add_argument("post")
    command.add_argument("file", nargs="?", help="POST.jpg in this folder, if it is left out")
    command.add_argument("--look", type=int, choices=range(1, 5), help="only a look: 1 is the first, with fewest bytes")
    command = add("comment", comment)
    command.add_argument("post")
    command.add_argument("text")
    command = add("delete", delete)
    command.add_argument("post")
    command.add_argument("comment", nargs="?")
    add("watch", watch)
    given = parser.parse_args()
    texts = [value for name, value in vars(given).items() if isinstance(value, str) and name != "file"]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        parser.error("an argument is not UTF-8")
    if given.patience is None:
        given.patience = PATIENCE.get(given.command, USUAL_PATIENCE)
    return given


def main() -> None:
    given = read_arguments()
    if sys.stdout:  # None if the caller has closed it
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        sys.exit(given.run(given))
    except Refused as refusal:
        hint = ". Log in: imagegram login" if refusal.status == 401 else ""
        status, reason = REFUSED, f"{refusal}{hint}"
    except Unusable as error:
        status, reason = UNUSABLE, str(error)
    except Unreachable as error:
        status, reason = UNREACHABLE, str(error)
    except (KeyboardInterrupt, EOFError):
        sys.exit(INTERRUPTED)
    except OSError as error:  # of stdout, or of the file that is read
        printing.close(1)
        if isinstance(error, BrokenPipeError):  # the reader of stdout has enough, for example `head`
            sys.exit(0)
        status, reason = UNUSABLE, settings.reason(error)
    note(f"imagegram: {reason}")
    sys.exit(status)


if __name__ == "__main__":
    main()
