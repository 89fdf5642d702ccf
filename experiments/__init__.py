"""The experiments: one file per figure, table or ablation."""
