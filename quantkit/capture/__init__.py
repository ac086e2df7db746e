"""Steps that are captured once and replayed: a function of tensors without the cost of calling its operators."""
