"""The same step in every loop: bit for bit what the callback does under Lightning's Trainer."""

import functools
from pathlib import Path

import cases
import pytest
from cases import PERTURBATIONS
from modules import OPTIMIZERS

from integrations.features import BOOST, FEATURES, LIGHTNING, Feature, assert_same, features_table
from integrations.loops import LOOPS, Job, Run
from lightning_ire import tags
from lightning_ire._checks import ConfigurationError

TESTS = Path(__file__).parent.parent


@functools.cache
def reference(perturbation: str, optimizer: str, accumulate: int) -> Run:
    return LOOPS[LIGHTNING](parity_job(perturbation, optimizer, accumulate))


def parity_job(perturbation: str, optimizer: str, accumulate: int) -> Job:
    return Job({**BOOST, "perturbation": PERTURBATIONS[perturbation]}, optimizer, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("optimizer", cases.first_at_once(OPTIMIZERS))
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != LIGHTNING])
def test_every_loop_is_the_trainer(
    loop: str, optimizer: str, perturbation: str, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = reference(perturbation, optimizer, accumulate)
    ours = LOOPS[loop](parity_job(perturbation, optimizer, accumulate))
    assert_same(ours, theirs)
    assert theirs.state["optimizers"][0]["flat"]["masks"]
    assert tags.STEP_NORM_FLAT in theirs.logs
    assert (tags.PERTURBED_LOSS in theirs.logs) == (perturbation != "none")


CELLS = [(feature, loop) for feature in FEATURES for loop in LOOPS if feature.tested(loop)]


@pytest.mark.parametrize(("feature", "loop"), CELLS, ids=[f"{feature.name}-{loop}" for feature, loop in CELLS])
def test_feature(feature: Feature, loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert feature.check is not None
    if loop not in feature.refused:
        feature.check(loop, tmp_path)
        return
    with pytest.raises(ConfigurationError, match=feature.refused[loop]) as caught:
        feature.check(loop, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_table_of_the_page_is_made_of_these() -> None:
    page = (TESTS.parent / "docs" / "loops.md").read_text()
    assert features_table() in page


@pytest.mark.parametrize("place", sorted({place for feature in FEATURES for place in feature.elsewhere.values()}))
def test_what_is_tested_elsewhere_is_there(place: str) -> None:
    file, name = place.split("::")
    assert f"def {name}" in (TESTS / file).read_text()
