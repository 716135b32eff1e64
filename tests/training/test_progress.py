"""The bar shows what it is told."""

import io

from rich.console import Console

from deeplimit.training.progress import Bar


def test_the_bar_shows_epoch_loss_accuracy_and_entry() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    row = dict.fromkeys(("learning_rate", "seconds", "validation_loss"), 0.0)
    with Bar(epochs=4, steps_per_epoch=3, epochs_done=1, console=console) as bar:
        bar.start("runs/x: what is trained")
        bar.step(lambda: (0.5, 0.25))
        bar.progress.refresh()
        assert bar.progress.tasks[0].completed == 4
        figures = {"epoch": 2.0, "loss": 0.125, "accuracy": 0.75, "validation_accuracy": 0.5}
        bar.epoch(row | figures | {"entry": 7.0})
        bar.progress.refresh()
        bar.warn("drift 0.5 at layer [1]")
        bar.epoch(row | figures | {"entry": 7.0, "drift": 0.0123, "epoch": 3.0})
        bar.progress.refresh()
    text = shown.getvalue()
    assert "runs/x: what is trained" in text
    assert "epoch 2/4" in text
    assert "loss 0.500  accuracy 25.0%" in text
    assert "epoch 3/4" in text
    assert "loss 0.125  accuracy 75.0%  validation: 50.0%, entry 7" in text
    assert "warning: drift 0.5 at layer [1]" in text
    assert "entry 7  drift 0.012" in text
