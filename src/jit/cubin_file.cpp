// SPDX-License-Identifier: Apache-2.0
#include "jit/cubin_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace fsa::jit {
namespace {

struct Header {
  char magic[8];
  std::uint64_t identity;
  std::uint64_t cubin_bytes;
  std::uint64_t log_bytes;
  std::uint64_t checksum;  // of what follows the header
  double seconds;
  std::int64_t nvrtc_version;
  std::uint64_t header_checksum;  // of the fields above
};
static_assert(sizeof(Header) == 64, "the format of files that exist");

constexpr char kMagic[8] = {'F', 'S', 'A', 'K', 'R', 'N', 'L', '1'};

std::uint64_t checksum_of(const Header& header) {
  return hash({reinterpret_cast<const char*>(&header), offsetof(Header, header_checksum)});
}

std::string failure(const char* what, const std::string& path) {
  return std::string(what) + " " + path + ": " + std::strerror(errno);
}

bool write_all(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(file, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  return true;
}

}  // namespace

std::string encode(const CubinFile& file, std::uint64_t identity) {
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.identity = identity;
  header.cubin_bytes = file.cubin.size();
  header.log_bytes = file.log.size();
  header.checksum = hash(file.log, hash(file.cubin));
  header.seconds = file.seconds;
  header.nvrtc_version = file.nvrtc_version;
  header.header_checksum = checksum_of(header);
  return std::string(reinterpret_cast<const char*>(&header), sizeof(header)) + file.cubin + file.log;
}

std::optional<CubinFile> decode(std::string_view bytes, std::uint64_t identity) {
  Header header;
  if (bytes.size() < sizeof(header)) return std::nullopt;
  std::memcpy(&header, bytes.data(), sizeof(header));
  bytes.remove_prefix(sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0 || header.header_checksum != checksum_of(header))
    return std::nullopt;
  if (header.identity != identity || header.cubin_bytes > bytes.size() ||
      header.log_bytes != bytes.size() - header.cubin_bytes || header.checksum != hash(bytes))
    return std::nullopt;
  return CubinFile{std::string(bytes.substr(0, header.cubin_bytes)),
                   std::string(bytes.substr(header.cubin_bytes)), static_cast<int>(header.nvrtc_version),
                   header.seconds};
}

std::optional<CubinFile> read_cubin(const std::string& path, std::uint64_t identity) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return std::nullopt;
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  return decode(bytes, identity);
}

std::string write_whole(const std::string& path, std::string_view bytes) {
  static std::atomic<unsigned> counter = 0;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return "cannot create " + folder.string() + ": " + error.message();
  const std::string part =
      path + "." + std::to_string(::getpid()) + "." + std::to_string(counter++) + ".part";
  const int file = ::open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) return failure("cannot create", part);
  std::string problem;
  if (!write_all(file, bytes) || ::fsync(file) != 0) problem = failure("cannot write", part);
  if (::close(file) != 0 && problem.empty()) problem = failure("cannot write", part);
  if (problem.empty() && ::rename(part.c_str(), path.c_str()) != 0) problem = failure("cannot rename", part);
  if (!problem.empty()) ::unlink(part.c_str());
  return problem;
}

}  // namespace fsa::jit
