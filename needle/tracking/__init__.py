"""Where metrics, tables and lineage go besides history.jsonl: Weights & Biases, or nowhere (conf/logger).

Offline by default: a run's transaction log and every file that it names lie in the run's own folder, so that

    wandb leet runs/train/NAME/wandb/offline-run-*    # shows it in the terminal
    wandb sync runs/train/NAME/wandb/offline-run-*    # sends it
    python -m needle.tracking runs                    # sends every run, and what they stand on first

give on a server what `logger.mode=online` would have given there. Cost: about two seconds a run, and once for each
corpus, shards and signals.
"""

from needle.tracking.wandb_tracking import NoTracking, Tracking, WandbTracking, identity_of

__all__ = ["NoTracking", "Tracking", "WandbTracking", "identity_of"]
