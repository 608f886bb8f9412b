"""rec: a complete recommender system, from raw interactions to an API that answers with recommendations.

Importing this package switches TensorFlow to Keras 2, which TensorFlow Recommenders needs. It has to happen before
TensorFlow itself is imported, so every module of `rec` is safe to import first and needs nothing set by the user.
"""

import os
import sys

if "tensorflow" in sys.modules and os.environ.get("TF_USE_LEGACY_KERAS") != "1":
    raise ImportError(
        "tensorflow was imported before rec, with Keras 3, which TensorFlow Recommenders cannot use: "
        "import rec first, or set TF_USE_LEGACY_KERAS=1 in the environment"
    )
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides TensorFlow's start-up notices, keeps its errors

__version__ = "0.1.0"
