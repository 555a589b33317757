"""All kinds of input. Another is a line in one of these files, or another file here."""

from malformed import configs, data, models, runs

KINDS = [*configs.KINDS, *data.KINDS, *models.KINDS, *runs.KINDS]
