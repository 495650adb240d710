# SPDX-License-Identifier: Apache-2.0
"""Runnable examples; import as `examples...` from the repository root."""
