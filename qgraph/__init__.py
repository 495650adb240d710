# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization as verified graph passes."""
