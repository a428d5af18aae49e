// SPDX-License-Identifier: Apache-2.0
// Whether this process may use the AMX tile registers.
#pragma once

namespace fsa::cpu {

// True when processor and operating system offer bfloat16 tiles and the system has granted them: the state of 8 KB a
// thread has to be asked for, once per process. Asks on the first call; never throws.
bool amx_granted();

}  // namespace fsa::cpu
