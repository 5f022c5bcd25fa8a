"""The operator: what there is (observe), what is to be done (plan), how it looks (render), doing it (apply)."""
