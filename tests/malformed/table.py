"""All kinds of input. Another is a line in one of these files, or another file here."""

import vtfast.evaluate  # noqa: F401  # torch and transformers: their imports are on no input's time
from malformed import configs, data, models, runs

KINDS = [*configs.KINDS, *data.KINDS, *models.KINDS, *runs.KINDS]
