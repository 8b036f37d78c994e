"""python -m compact.study GRID.yaml: a recipe × settings × methods × seeds, each cell a run, and what comes out."""
