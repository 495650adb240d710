# SPDX-License-Identifier: Apache-2.0
"""Small trained models and the synthetic-on-real data they are trained and measured on."""
