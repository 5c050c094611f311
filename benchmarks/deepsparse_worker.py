"""Runs DeepSparse in a separate environment; inference.py calls it with --deepsparse.

    pip install deepsparse==1.8.0                     # in that environment, of Python 3.8 to 3.11
    python deepsparse_worker.py MODEL.onnx IMAGES.npy BATCH THREADS OUTPUT.npy

Writes the outputs, then runs the model once for each line that it reads, and answers each with one.
After the line `answer` it reads the images again first, and writes the outputs again.
"""

import sys

import deepsparse
import numpy as np


def main() -> None:
    """Serve until the input ends."""
    model, images, batch, threads, output = sys.argv[1:]
    engine = deepsparse.compile_model(model, batch_size=int(batch), num_cores=int(threads))
    inputs = [np.load(images)]
    np.save(output, engine.run(inputs)[0])
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "answer":
            inputs = [np.load(images)]
            np.save(output, engine.run(inputs)[0])
        else:
            engine.run(inputs)
        print("done", flush=True)


if __name__ == "__main__":
    main()
