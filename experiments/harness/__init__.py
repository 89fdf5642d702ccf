"""What every experiment uses: its form, its results, the report, data and prepared texts."""
