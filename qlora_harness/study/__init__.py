"""`qlora-harness study`: every arm and seed of a question, trained, scored and compared."""
