"""The parts of `bench/compare`: what runs (`work`, `curve`, `scale`, `decode`), on what (`machine`), and the tables (`tables`)."""
