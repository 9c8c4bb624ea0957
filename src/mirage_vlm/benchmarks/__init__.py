"""Floor 4: the benchmarks behind `mirage bench`. What each measures is told in `benchmarks/README.md`."""
