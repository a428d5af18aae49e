// SPDX-License-Identifier: Apache-2.0
#include "fsa/tensor.h"
#include "fsa/version.h"

namespace fsa {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::none:
      return "none";
    case DType::float64:
      return "float64";
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::other:
      break;
  }
  return "other";
}

const char* version() { return FSA_VERSION_STRING; }

}  // namespace fsa
