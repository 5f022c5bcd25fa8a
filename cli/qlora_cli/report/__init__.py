"""The page of ``qlora report``."""
