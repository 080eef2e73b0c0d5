from d2qconv.api import evaluate as evaluate
from d2qconv.api import evaluate_tasks as evaluate_tasks
from d2qconv.api import export as export
from d2qconv.api import inspect as inspect
from d2qconv.api import plan as plan
from d2qconv.api import quantize as quantize
from d2qconv.api import verify as verify
from d2qconv.errors import D2qError as D2qError
from d2qconv.run import CalibrationSpec as CalibrationSpec
from d2qconv.run import Recipe as Recipe

__version__: str
