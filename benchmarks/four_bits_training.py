"""Whether adapters heal a quantised transformer: the runs that notebook 10 reads.

MiniLM learns what transformer_runs.py teaches it, on a base of 32, four and two bits.
Each method gets its rate on split 0, and then runs on the splits 1 to 3. The base of
four bits takes the rates of the unbroken one, as QLoRA does. A run that is in
notebooks/results/four_bits_training.csv isn't made again.
"""

from pathlib import Path

from transformer_runs import BASES, FILE, SPLITS, Run, best, make, widened

OUTPUT = FILE.with_name("four_bits_training.csv")
PLACES = "all linear layers"
RATES = (0.001, 0.003)
METHODS = ("LoRA", "gain alone")


def main() -> Path:
    """Tune, report, and return the file with the rows."""
    chosen = []
    for base in ("2 bits", "32 bits"):
        for method in METHODS:
            runs = [Run(method, PLACES, rate, base=base) for rate in RATES]
            rows = widened(make(runs, OUTPUT), OUTPUT, method=method, base=base)
            chosen.append(best(rows, method=method, base=base))
    chosen += [run._replace(base="NF4") for run in chosen if run.base == "32 bits"]
    chosen += [Run("head", PLACES, base=base) for base in BASES]
    make([run._replace(split=split) for split in SPLITS for run in chosen], OUTPUT)
    return OUTPUT


if __name__ == "__main__":
    print(main())
