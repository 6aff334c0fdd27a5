"""What the server runs: the strategy, and the adapter at the end."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from honeloom import lab
from honeloom.flower import FloraStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federate, and save the result where `adapter` says."""
    settings = context.run_config
    strategy = FloraStrategy(
        str(settings["rule"]), fraction_evaluate=float(settings["evaluate"]),
        min_available_nodes=3, min_train_nodes=3, min_evaluate_nodes=3,
    )  # fmt: skip
    strategy.start(grid, num_rounds=int(settings["rounds"]))
    if settings["adapter"]:
        print("saved", strategy.save(str(settings["adapter"]), base_model=str(lab.base_path())))
