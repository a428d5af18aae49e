# SPDX-License-Identifier: Apache-2.0
"""Parts of the example train_byte_lm.py: a small language model over bytes, trained and shown."""
