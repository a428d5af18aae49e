// SPDX-License-Identifier: Apache-2.0
// Umbrella header: everything public.
#pragma once

#include "fsa/attention.h"   // IWYU pragma: export
#include "fsa/block_mask.h"  // IWYU pragma: export
#include "fsa/error.h"       // IWYU pragma: export
#include "fsa/nsa.h"         // IWYU pragma: export
#include "fsa/tensor.h"      // IWYU pragma: export
#include "fsa/version.h"     // IWYU pragma: export
