"""Run all benchmarks, and write their results to notebooks/results/."""

import adapter_speed
import article_protocol
import first_cell
import merged_forms
import mixed_batches
import running_times
import sweep_speed
import training_loop
import transformer_memory

if __name__ == "__main__":
    for benchmark in (
        article_protocol,
        training_loop,
        sweep_speed,
        adapter_speed,
        merged_forms,
        mixed_batches,
        transformer_memory,
        running_times,
        first_cell,
    ):
        print(" ".join(benchmark.__doc__.split("\n\n")[0].split()))
        print(f"  written to {benchmark.main()}")
