"""Memory of a rank as components that add up to its peak."""

from qlora_cli.text.memory_rows import memory_rows, memory_words

GIB = 1 << 30


def test_on_a_gpu_components_and_peak_are_of_the_device():
    predicted = {"quantizedWeights": 4 * GIB, "activations": 2 * GIB, "peak": 6 * GIB}
    measured = {"quantizedWeights": 4 * GIB, "peak": 7 * GIB}
    assert memory_rows(predicted, measured) == [
        ("quantized weights", 4 * GIB, 4 * GIB),
        ("activations", 2 * GIB, None),
        ("not measured separately", None, 3 * GIB),
        ("peak", 6 * GIB, 7 * GIB),
    ]


def test_on_a_cpu_the_peak_is_said_to_be_that_of_the_process():
    predicted = {"quantizedWeights": GIB, "activations": GIB}
    measured = {"quantizedWeights": GIB, "peak": 3 * GIB}
    assert memory_rows(predicted, measured) == [
        ("quantized weights", GIB, GIB),
        ("activations", GIB, None),
        ("Python, libraries, activations", None, 2 * GIB),
        ("all tensors", 2 * GIB, None),
        ("peak of the process (CPU)", None, 3 * GIB),
    ]
    assert memory_words(predicted, measured, "CPU").startswith(
        "Memory of a rank, peak of the process (CPU) 3.00 GiB: quantized weights 1.00 GiB · "
    )


def test_nothing_known_is_nothing_shown():
    assert memory_rows({}, {}) == []
    assert memory_words({}, {}, "CPU") == ""
