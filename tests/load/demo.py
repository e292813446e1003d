"""`make demo`: fills a site that runs with drawn pictures by a dozen people, and with their comments.

It uses the public API only, and mints tokens with the secret of the site on this machine, as `imagegram-api token`
does. It may be run again: a post that the feed already has is not sent again, and what an earlier run may have sent has
the same Idempotency-Key, because everything is drawn from one seed.
"""

import argparse
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.client.calls import Site
from api.client.uploading import wait_until_ready
from api.tokens import mint
from storage import settings
from tests.load.drawing import picture

SEED = "imagegram-demo-1"
POSTS = 300
MOST = 150  # comments of the most popular post. The nth gets MOST / n, as Zipf says: 780 in all
PEOPLE = ["ada", "bela", "chidi", "dana", "emre", "fatou", "goran", "hana", "ines", "jiro", "kofi", "lena"]
PATIENCE = 60.0  # seconds that a call is repeated while the site is busy or away
THREADS = 6  # more than cores: a thread also waits for answers
PLACES = ["Near Oulu", "In Lagos", "On Naxos", "Above Cusco", "At home", "By the Volga", "In the rain", "After work"]
SAID = [
    "What a place!",
    "I was there in spring.",
    "Is this by the sea?",
    "The colours!",
    "So quiet.",
    "How did you do this?",
    "My favourite so far 🌿",
    "Wo ist das?",
    "¡Qué bonito!",
    "すごい",
    "Très beau.",
    "Looks cold 🥶",
    "Take me with you.",
    "I can almost hear it.",
    "Print this one.",
    "Again, please!",
    "Good light.",
    "That was a long walk.",
]


class Plan(NamedTuple):
    """A post that is to exist."""

    number: int
    author: str
    caption: str
    comments: list[tuple[str, str]]  # author and text


def plans(count: int) -> Iterator[Plan]:
    rng = random.Random(SEED)
    ranks = list(range(1, POSTS + 1))
    rng.shuffle(ranks)
    for number in range(count):
        said = [(rng.choice(PEOPLE), rng.choice(SAID)) for _ in range(MOST // ranks[number])]
        # The number makes the caption unique among its author's posts.
        yield Plan(number, PEOPLE[number % len(PEOPLE)], f"{rng.choice(PLACES)}, no. {number + 1}", said)


def read_feed(site: Site) -> Iterator[dict]:
    cursor = ""
    while cursor is not None:
        page = site.call("GET", "/v1/posts", params={"limit": 100} | ({"cursor": cursor} if cursor else {})).json()
        yield from page["items"]
        cursor = page["next"]


def publish(site: Site, plan: Plan) -> dict:
    kind, ending, data = picture(random.Random(f"{SEED} {plan.number}"))
    image = f"{kind}-{plan.number}.{ending}", data
    key = f"{SEED}-{plan.number}"
    return site.call("POST", "/v1/posts", key, files={"image": image}, data={"caption": plan.caption}).json()


def comment(sites: dict[str, Site], plan: Plan, post: dict, n: int) -> None:
    author, text = plan.comments[n]
    key = f"{SEED}-{plan.number}-{n}"
    sites[author].call("POST", f"/v1/posts/{post['id']}/comments", key, json={"text": text})


def fill(url: str, sites: dict[str, Site], count: int, progress: Progress) -> tuple[int, int]:
    """Creates what is missing. Returns how many posts and comments were sent."""
    known = {(post["author"], post["caption"]): post for post in read_feed(sites[PEOPLE[0]])}
    wanted = list(plans(count))
    drawing = progress.add_task("pictures drawn and sent", total=len(wanted))
    making = progress.add_task("pictures made by the site", total=len(wanted))
    talking = progress.add_task("comments", total=sum(len(plan.comments) for plan in wanted))

    def post_of(plan: Plan) -> tuple[Plan, dict, bool]:
        found = known.get((plan.author, plan.caption))
        post = found or publish(sites[plan.author], plan)
        progress.advance(drawing)
        return plan, post, not found

    def comment_on(plan: Plan, post: dict) -> int:
        post = wait_until_ready(sites[plan.author], post)
        progress.advance(making)
        already = min(post["comment_count"], len(plan.comments))
        progress.advance(talking, already)
        for n in range(already, len(plan.comments)):
            comment(sites, plan, post, n)
            progress.advance(talking)
        return len(plan.comments) - already

    with ThreadPoolExecutor(THREADS) as pool:
        posts = list(pool.map(post_of, wanted))
        commented = list(pool.map(lambda row: comment_on(*row[:2]), posts))
    return sum(new for *_, new in posts), sum(commented)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--posts", type=int, default=POSTS, help=f"at most {POSTS}")
    count = min(POSTS, parser.parse_args().posts)
    chosen = settings.load()
    url = f"http://{chosen.host}:{chosen.port}"
    console = Console(stderr=True)
    sites = {
        name: Site(url, mint(chosen, name), PATIENCE, lambda text: console.print(text, markup=False)) for name in PEOPLE
    }
    columns = TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        posts, comments = fill(url, sites, count, progress)
    top = sites[PEOPLE[0]].call("GET", "/v1/posts", params={"limit": 1}).json()["items"][0]
    print(f"{posts} posts and {comments} comments added. Look at them:")
    print(f"  the most popular picture   {url}{top['image']['url']}")
    print(f"  the feed                   IMAGEGRAM_URL={url} imagegram feed")
    print(f"  its comments               IMAGEGRAM_URL={url} imagegram show {top['id']}")


if __name__ == "__main__":
    main()
