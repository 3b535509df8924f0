"""`--patience`: a run ends once the validation loss has not been lower for some epochs."""

import json

import pytest

from fdl import io, tree

# Without a penalty, 200 features and 20 examples overfit at once: the validation loss rises.
ARGS = ("weight-decay", "--weight-decay", 0, "--lr", 0.01, "--validation", 0.3, "--compile", "off")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return io.load(folder / "params.safetensors")


@pytest.fixture
def whole(run, tmp_path):
    """The losses of a run of 30 epochs, and a function that trains to one of them."""
    assert run(*ARGS, "--epochs", 30, "--out", "whole")[0] == 0
    losses = [record["validation_loss"] for record in records(tmp_path / "whole")]

    def to(epoch):
        folder = tmp_path / f"to {epoch}"
        assert folder.exists() or run(*ARGS, "--epochs", epoch, "--out", folder)[0] == 0
        return saved(folder)

    return losses, to


def expected_end(losses, patience):
    """The rule, written out: the epoch that ends the run, and the best until then."""
    best = 0
    for epoch, loss in enumerate(losses):
        if loss < losses[best]:
            best = epoch
        if epoch - best >= patience:
            return epoch + 1, best + 1
    return len(losses), best + 1


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 3])
def test_it_ends_after_so_many_epochs_and_keeps_the_best_weights(run, tmp_path, whole, patience):
    losses, to = whole
    last, best = expected_end(losses, patience)
    assert best < last < 30
    code, out, _ = run(*ARGS, "--epochs", 30, "--patience", patience, "--out", "it")
    assert code == 0 and len(records(tmp_path / "it")) == last
    assert [r["validation_loss"] for r in records(tmp_path / "it")] == losses[:last]
    assert f"epoch {best} has the lowest validation loss" in out
    assert f"--patience {2 * patience}" in out
    assert tree.diff(saved(tmp_path / "it"), to(best)) == []
    # What the run keeps is what is looked at.
    assert f"after step {14 * best}" in run("eval", "it")[1]
    table = run("compare", "it", "whole")[1].splitlines()
    shown = [row.split() for row in table[1:3]]
    assert [row[0] for row in shown] == ["it", "whole"]
    assert str(best) in shown[0] and f"{losses[best - 1]:.4g}" in shown[0]
    assert "30" in shown[1] and f"{losses[-1]:.4g}" in shown[1]
    # Once more: nothing is left to do. With more patience it goes on as if it had never ended.
    assert run("weight-decay", "--resume", "it")[0] == 0
    assert len(records(tmp_path / "it")) == last
    assert run("weight-decay", "--resume", "it", "--patience", 30)[0] == 0
    assert [r["validation_loss"] for r in records(tmp_path / "it")] == losses
    assert tree.diff(saved(tmp_path / "it"), to(expected_end(losses, 30)[1])) == []


@pytest.mark.slow
def test_a_run_stopped_in_between_ends_where_it_would_have(run, tmp_path, whole):
    losses, _ = whole
    last, best = expected_end(losses, 3)
    options = (*ARGS, "--patience", 3, "--out", "it")
    assert run(*options, "--epochs", max(1, last - 2))[0] == 0
    assert run("weight-decay", "--resume", "it", "--epochs", 30)[0] == 0
    assert len(records(tmp_path / "it")) == last
    found = run("eval", "it")
    assert found[0] == 0 and best < last


@pytest.mark.slow
def test_a_run_that_did_not_save_its_best_epoch_cannot_keep_it(run, tmp_path):
    assert run(*ARGS, "--epochs", 9, "--out", "it")[0] == 0
    losses = [record["validation_loss"] for record in records(tmp_path / "it")]
    best = losses.index(min(losses)) + 1
    assert best < 9  # and only the end was saved, as it took less than --save-every
    code, _, err = run("weight-decay", "--resume", "it", "--patience", 2)
    assert code == 2 and f"has no checkpoint of epoch {best}, whose validation loss is" in err
    assert run("weight-decay", "--resume", "it", "--epochs", 10)[0] == 0


def test_it_needs_a_validation_set(run):
    code, _, err = run("weight-decay", "--patience", 3)
    assert code == 2 and "--patience 3 needs --validation, such as --validation 0.1" in err
    code, _, err = run(*ARGS, "--patience", 0)
    assert code == 2 and "--patience must be at least 1, got 0" in err
    assert "patience" not in run("sweep", "weight-decay", "--help")[1]
