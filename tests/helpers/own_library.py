"""Runs a script with the library beside it, whichever is installed:

python tests/helpers/own_library.py /somewhere/bge_accel/scripts/finetune.py ...
"""

import os
import runpy
import sys

sys.argv = sys.argv[1:]
script = next(part for part in sys.argv if os.path.basename(os.path.dirname(part)) == "scripts")
tree = os.path.dirname(os.path.dirname(os.path.abspath(script)))
sys.path.insert(0, tree)
os.environ["PYTHONPATH"] = tree  # for the processes that the script starts
import bge_accel  # noqa: E402

assert os.path.dirname(bge_accel.__file__) == os.path.join(tree, "bge_accel"), bge_accel.__file__
sys.path.pop(0)
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
