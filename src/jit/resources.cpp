// SPDX-License-Identifier: Apache-2.0
#include "jit/resources.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstring>
#include <sstream>
#include <string_view>

namespace fsa::jit {
namespace {

constexpr std::uint64_t kOperationMask = 0x1ff;
enum Operation : std::uint64_t { kBar = 0x11d, kLdl = 0x183, kStl = 0x187, kHgmma = 0x1f0 };

template <class T>
bool read_at(std::string_view bytes, std::uint64_t offset, T& value) {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return false;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return true;
}

// ELF64, little-endian: the fields that are needed.
struct Section {
  std::uint32_t name;
  std::uint32_t type;
  std::uint64_t flags, address, offset, bytes;
  std::uint32_t link, info;
  std::uint64_t alignment, entry_bytes;
};
static_assert(sizeof(Section) == 64, "as in the file");

// The bytes of every section that holds machine code.
std::vector<std::string_view> code_sections(std::string_view elf) {
  std::vector<std::string_view> code;
  std::uint64_t table = 0;
  std::uint16_t count = 0, names_index = 0;
  Section names = {};
  if (!elf.starts_with("\x7f"
                       "ELF") ||
      !read_at(elf, 0x28, table) || !read_at(elf, 0x3c, count) || !read_at(elf, 0x3e, names_index) ||
      !read_at(elf, table + sizeof(Section) * names_index, names) || names.offset > elf.size())
    return code;
  const std::string_view name_table = elf.substr(names.offset, names.bytes);
  for (std::uint16_t i = 0; i < count; ++i) {
    Section section;
    if (!read_at(elf, table + sizeof(Section) * i, section)) break;
    if (section.name >= name_table.size() || section.offset > elf.size()) continue;
    if (name_table.substr(section.name).starts_with(".text."))
      code.push_back(elf.substr(section.offset, section.bytes));
  }
  return code;
}

// The number before the first `phrase` of the line, -1 where there is none.
int number_before(std::string_view line, std::string_view phrase) {
  const std::size_t end = line.find(phrase);
  if (end == std::string_view::npos) return -1;
  const std::size_t begin = line.find_last_not_of("0123456789", end == 0 ? 0 : end - 1) + 1;
  int value = -1;
  if (begin < end) std::from_chars(line.data() + begin, line.data() + end, value);
  return value;
}

bool contains_any_case(std::string_view line, std::string_view word) {
  return std::search(line.begin(), line.end(), word.begin(), word.end(),
                     [](unsigned char a, unsigned char b) { return std::tolower(a) == b; }) != line.end();
}

void read_log(const std::string& log, Resources& found) {
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    if (line.find("Used ") != std::string::npos)
      found.registers = std::max(found.registers, number_before(line, " registers"));
    found.stack_bytes = std::max(found.stack_bytes, number_before(line, " bytes stack frame"));
    found.spill_bytes = std::max(found.spill_bytes, number_before(line, " bytes spill stores") +
                                                        number_before(line, " bytes spill loads"));
    if (contains_any_case(line, "serializ") || contains_any_case(line, "setmaxnreg"))
      found.notes.push_back(line);
  }
}

}  // namespace

Resources resources_of(const CubinFile& file) {
  Resources found;
  read_log(file.log, found);
  for (const std::string_view code : code_sections(file.cubin)) {
    std::uint64_t word = 0;
    for (std::uint64_t offset = 0; read_at(code, offset, word); offset += 16) {
      ++found.instructions;
      const std::uint64_t operation = word & kOperationMask;
      found.tensor_multiplies += operation == kHgmma;
      found.local_accesses += operation == kLdl || operation == kStl;
      found.barriers += operation == kBar;
    }
  }
  return found;
}

}  // namespace fsa::jit
