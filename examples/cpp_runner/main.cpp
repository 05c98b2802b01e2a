// Continue a text with a package that slimfx compiled and libtorch: no Python, no slimfx.
//   runner package.pt2 vocabulary.txt "12 305 7" 40 [--logits FILE]

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <regex>
#include <sstream>

using Strings = std::vector<std::string>;
using Tokens = std::vector<int64_t>;

void require(bool holds, const std::string& sentence) {
  if (!holds) throw std::runtime_error(sentence);
}

// The shortest and longest sequence of a package; compiled code does not check its inputs itself.
std::pair<size_t, size_t> range(const std::string& path) {
  require(std::ifstream(path).good(), path + ": no such file");
  caffe2::serialize::PyTorchStreamReader archive(path);
  require(archive.hasRecord("slimfx/aoti.json"), path + ": not a package that slimfx compiled");
  const auto [data, size] = archive.getRecord("slimfx/aoti.json");
  const std::string record(static_cast<const char*>(data.get()), size);
  const std::vector<std::pair<std::string, bool>> processor = {
      {"avx2", __builtin_cpu_supports("avx2")}, {"avx512_bw", __builtin_cpu_supports("avx512bw")},
      {"avx512_vl", __builtin_cpu_supports("avx512vl")},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni")},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16")}};
  for (const auto& [name, has] : processor)
    require(has || record.find('"' + name + '"') == std::string::npos,
            path + ": was built for a processor with " + name + ", this one is without");
  const std::regex input(R"("inputs": \[\{"dtype": "torch.int64", "name": "input_ids", )"
                         R"("sizes": \[\[1, \w+\], \[(\d+), (\d+|null)\]\]\}\])");
  std::smatch found;
  require(std::regex_search(record, found, input),
          path + ": does not take one input_ids, int64 of shape [1, sequence]");
  return {std::stoul(found[1]), found[2] == "null" ? SIZE_MAX : std::stoul(found[2])};
}

// One token a line: its bytes in hex, or "end" for the token that ends a text.
Strings vocabulary(const std::string& path) {
  std::ifstream file(path);
  require(file.good(), path + ": no such file");
  Strings lines;
  for (std::string line; std::getline(file, line); lines.push_back(line))
    require(line == "end" || line.find_first_not_of("0123456789abcdef") == std::string::npos,
            path + ": not a vocabulary that prepare.py wrote");
  return lines;
}

Tokens numbers(const std::string& text) {
  require(std::regex_match(text, std::regex(R"(\s*\d{1,9}(\s+\d{1,9})*\s*)")),
          "'" + text + "': not whole numbers with spaces between");
  std::istringstream stream(text);
  return {std::istream_iterator<int64_t>(stream), {}};
}

void run(const Strings& words) {
  require(words.size() == 4 || (words.size() == 6 && words[4] == "--logits"),
          "usage: runner package.pt2 vocabulary.txt \"token ids\" tokens [--logits FILE]");
  const auto [shortest, longest] = range(words[0]);
  const Strings known = vocabulary(words[1]);
  Tokens ids = numbers(words[2]);
  const size_t largest = *std::max_element(ids.begin(), ids.end());
  require(largest < known.size(), "token " + std::to_string(largest) + " is not in " + words[1]);
  const Tokens count = numbers(words[3]);
  require(count.size() == 1 && count[0] > 0, "'" + words[3] + "': not a number of tokens");
  torch::inductor::AOTIModelPackageLoader model(words[0]);
  at::Tensor logits;
  for (int64_t i = 0; i < count[0]; ++i) {
    Tokens context(ids.end() - std::min(ids.size(), longest), ids.end());
    context.insert(context.begin(), shortest - std::min(shortest, context.size()), context[0]);
    const auto answer = model.run({at::tensor(context, at::kLong).unsqueeze(0)})[0];
    logits = answer.select(1, -1).flatten().to(at::kFloat).contiguous();
    ids.push_back(logits.argmax().item<int64_t>());
    const std::string hex = static_cast<size_t>(ids.back()) < known.size() ? known[ids.back()] : "";
    if (hex == "end") break;
    for (size_t byte = 0; byte + 1 < hex.size(); byte += 2)
      std::cout.put(static_cast<char>(std::stoi(hex.substr(byte, 2), nullptr, 16)));
    std::cout.flush();
  }
  if (words.size() == 4) return;
  std::ofstream file(words[5], std::ios::binary);
  file.write(static_cast<const char*>(logits.const_data_ptr()), logits.nbytes()).flush();
  require(file.good(), words[5] + ": cannot be written");
}

int main(int count, char** words) try {
  const c10::InferenceMode guard;
  run({words + 1, words + count});
} catch (const std::exception& error) {
  const auto* deep = dynamic_cast<const c10::Error*>(&error);
  std::string text = deep ? words[1] + (": " + deep->msg()) : error.what();
  std::cerr << "error: " << text.substr(0, text.find('\n')) << '\n';
  return 1;
}
