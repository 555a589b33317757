"""Judging a policy on questions that it was not trained on: one file a benchmark."""
