# SPDX-License-Identifier: Apache-2.0
"""Three passes to learn from; their property tests are in tests/examples/test_example_passes.py."""
