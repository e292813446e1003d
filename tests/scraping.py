"""Reads what a part of a site answers to Prometheus."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """The numbers of one scrape."""

    def __init__(self, url: str):
        answer = httpx.get(f"{url}/metrics", timeout=30)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        self.families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples with this name and these labels. Fails if there is none."""
        values = [each.value for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        assert values, f"{name} {labels} is missing"
        return sum(values)

    def __contains__(self, name: str) -> bool:
        return any(sample.name == name for sample in self.samples)
