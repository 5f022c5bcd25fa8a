"""The tape follows autograd's rules."""

from __future__ import annotations

from qlora_memory.activations.tape import Tape, Value


def test_nothing_is_kept_for_what_does_not_learn():
    tape, x = Tape(), Value(10, 2, learns=False)
    tape.record(x, elements=10, width=2, saves=(x,))
    assert tape.saved() == 0
    assert tape.backward_peak() == 0


def test_a_tensor_that_two_operations_save_is_held_once():
    tape, x = Tape(), Value(10, 2, learns=True)
    tape.record(x, elements=10, width=2, saves=(x,))
    tape.record(x, elements=10, width=2, saves=(x,))
    assert tape.saved() == 20
    assert tape.saved(elsewhere=(x,)) == 0


def test_saved_tensors_go_when_the_last_user_is_done():
    tape, x = Tape(), Value(100, 1, learns=True)
    y = tape.record(x, elements=100, width=1, saves=(x,))  # saves 100
    tape.record(y, elements=100, width=1, saves=(y,))  # saves 100
    # both saved, the gradient of the end, and that of y: 400; then x saved, gradients of y and x: 300
    assert tape.backward_peak() == 400


def test_a_gradient_that_passes_through_is_no_new_tensor():
    tape, x, y = Tape(), Value(100, 1, learns=True), Value(100, 1, learns=True)
    tape.record(x, y, elements=100, width=1, passes_gradient=True)
    assert tape.backward_peak() == 100


def test_a_second_gradient_is_added_in_place():
    tape, x = Tape(), Value(100, 1, learns=True)
    y = tape.record(x, elements=100, width=1)
    z = tape.record(x, elements=100, width=1)
    tape.record(y, z, elements=100, width=1, passes_gradient=True)
    # the shared gradient of y and z, that of x from z, and the one from y before it is added
    assert tape.backward_peak() == 300


def test_forward_tensors_go_after_their_last_use():
    tape, x = Tape(), Value(100, 1, learns=False)
    y = tape.record(x, elements=100, width=1)
    z = tape.record(y, elements=100, width=1)
    tape.record(z, elements=100, width=1)
    assert tape.forward_peak() == 200


def test_workspace_counts_while_the_operation_runs():
    tape, x = Tape(), Value(10, 1, learns=True)
    tape.record(x, elements=10, width=1, workspace=50, backward_workspace=70)
    assert tape.forward_peak() == 60
    assert tape.backward_peak() == 90
