"""The data card: its numbers against the corpus, and the committed card against the one of the default settings."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from needle.config import build
from needle.corpus import catalogue
from needle.corpus.card import card
from needle.schema import SPLITS


def test_the_committed_card_is_the_one_of_the_default_settings(repository: Path):
    with initialize_config_dir(version_base="1.3", config_dir=str(repository / "conf")):
        settings = build(compose("generate").data)
    folder = repository / settings.corpus
    loaded = catalogue.load(folder)
    by_split = {split: [e for e in loaded.examples if settings.split.assign(e) == split] for split in SPLITS}
    text = card(loaded, by_split, folder=folder)
    assert (repository / "data" / "README.md").read_text("utf-8") == text, (
        "data/README.md is out of date: copy README.md of the folder that `python -m needle.generate` names"
    )


def test_the_card_counts(tmp_path: Path):
    (tmp_path / "home.tools.json").write_text('[{"name": "light_on"}, {"name": "light_off"}]')
    (tmp_path / "home.jsonl").write_text(
        '{"k": "single", "q": "light please", "c": [["light_on", {}]]}\n'
        '{"k": "multi", "q": "light on and then off", "c": [["light_on", {}], ["light_off", {}]]}\n'
        '{"k": "none", "q": "how old is the moon", "c": []}\n'
        '{"k": "single", "q": "dark", "c": [["unknown", {}]]}\n'
    )
    loaded = catalogue.load(tmp_path)
    by_split = {"train": loaded.examples[:2], "validation": [], "test": loaded.examples[2:], "unseen": []}
    text = card(loaded, by_split, folder=tmp_path)
    assert "3 requests in 1 domains with 2 tools, answered by 3 calls" in text
    assert "4.0 words a request (median 5, longest 5). Quarantined records: 1." in text
    for line in (
        "| single | 1 | 0 | 0 | 0 | 1 |",
        "| none | 0 | 0 | 1 | 0 | 1 |",
        "| all | 2 | 0 | 1 | 0 | 3 |",
        "| 2 | 1 |",
        "| home | seen | 2 | 3 | 3 | `light_on`, `light_off` |",
    ):
        assert line in text.splitlines()
