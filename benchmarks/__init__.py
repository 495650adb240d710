# SPDX-License-Identifier: Apache-2.0
"""Side-by-side measurements; every command prints JSON."""
