"""What each client runs: receive, train, reply."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from honeloom.flower import receive, reply
from lora_app import task

app = ClientApp()


def _own(context: Context) -> tuple[int, int, int]:
    """Which client this is, of how many, and its rank."""
    node = context.node_config
    client = int(node["partition-id"])
    return client, int(node["num-partitions"]), int(node.get("rank", task.RANKS[client % len(task.RANKS)]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this client's adapter from where the federation stands."""
    client, clients, rank = _own(context)
    model, rows = task.model_of(rank), task.rows_of(client, clients, "dev")
    receive(model, message, context)
    loss = task.train(model, rows, int(context.run_config["steps"]), float(context.run_config["lr"]))
    return reply(model, message, context, rows=len(rows), metrics={"loss": loss})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the whole update on rows that nobody trained on."""
    client, clients, rank = _own(context)
    model, rows = task.model_of(rank), task.rows_of(client, clients, "test")
    receive(model, message, context)
    return reply(model, message, context, rows=len(rows), metrics={"loss": task.evaluate(model, rows)})
