// Random problems for every operation of every instruction set that runs here, against sums written out in double.
//
//     fuzz [cases] [first seed]
//
// Tensors lie in memory of exactly their size, so that an address sanitizer sees every element read beyond it, and keys
// that no row sees hold NaN. Exit status 1 and a line for the first problem that is not right.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <random>
#include <vector>

#include "../arguments.h"
#include "../machine.h"

#define DECLARE(isa) namespace isa { extern const Kernels kernels; }
SHARDSUM_EACH_ISA(DECLARE)

namespace {

using Random = std::mt19937_64;
#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

int64_t pick(Random& random, std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
}
int64_t between(Random& random, int64_t least, int64_t most) { return least + int64_t(random() % uint64_t(most - least + 1)); }

const int64_t SIZES[] = {4, 2, 2, 8};

void put(Type type, void* to, int64_t at, double x) {
    if (type == Type::float64) {
        static_cast<double*>(to)[at] = x;
    } else if (type == Type::float32) {
        static_cast<float*>(to)[at] = float(x);
    } else if (type == Type::float16) {
        static_cast<Half*>(to)[at] = Half(x);
    } else {
        float f = float(x);
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        static_cast<uint16_t*>(to)[at] = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

double get(Type type, const void* from, int64_t at) {
    if (type == Type::float64) return static_cast<const double*>(from)[at];
    if (type == Type::float32) return static_cast<const float*>(from)[at];
    if (type == Type::float16) return double(static_cast<const Half*>(from)[at]);
    uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[at]) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// A tensor (batch, heads, length, dim) with heads or positions outside, and room between rows.
struct Held {
    Type type;
    int64_t heads, length, dim;
    Tensor tensor;
    std::unique_ptr<char[]> memory;

    Held(Random& random, Type type, int64_t batch, int64_t heads, int64_t length, int64_t dim)
        : type(type), heads(heads), length(length), dim(dim) {
        int64_t width = dim + pick(random, {0, 0, 3});
        bool positions_outside = random() % 2;
        int64_t row = positions_outside ? heads * width : width, head = positions_outside ? width : length * width;
        // The last row ends where its elements do.
        int64_t count = batch * heads * length * width - (width - dim);
        memory.reset(new char[count * SIZES[int(type)]]);
        tensor = {memory.get(), heads * length * width, head, row};
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < count; i++) put(type, memory.get(), i, normal(random));
    }

    int64_t at(int64_t b, int64_t h, int64_t i, int64_t d) const {
        return b * tensor.batch + h * tensor.head + i * tensor.row + d;
    }
    // Row (b, h, i) in double.
    std::vector<double> row(int64_t b, int64_t h, int64_t i) const {
        std::vector<double> found(dim);
        for (int64_t d = 0; d < dim; d++) found[d] = get(type, memory.get(), at(b, h, i, d));
        return found;
    }
    void poison(int64_t b, int64_t i) {
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < dim; d++) put(type, memory.get(), at(b, h, i, d), NAN);
    }
};

// What an operation returned, and what it should have.
struct Compared {
    std::vector<double> found, expected, size;  // `size` is that of the terms that were summed

    // The error's norm over that of the terms.
    double error() const {
        double error = 0, norm = 1e-30;
        for (size_t i = 0; i < found.size(); i++) {
            if (found[i] == expected[i]) continue;  // infinities too
            double d = found[i] - expected[i];
            if (!(std::abs(d) <= 1e300)) return INFINITY;
            error += d * d;
        }
        for (double s : size) norm += std::isfinite(s) ? s * s : 0;
        return std::sqrt(error / norm);
    }
};

uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

class Problem {
public:
    explicit Problem(uint64_t seed) : random(seed) {
        a.type = Type(random() % 4);
        a.batch = between(random, 1, 3);
        a.kv_heads = between(random, 1, 3);
        a.q_heads = a.kv_heads * between(random, 1, 5);
        a.q_len = pick(random, {1, 1, 2, between(random, 1, 40), between(random, 1, 400)});
        a.kv_len = pick(random, {1, 2, between(random, 1, 60), between(random, 1, 900)});
        a.head_dim = pick(random, {64, 80, 128, between(random, 1, 40), between(random, 1, 200)});
        a.v_dim = pick(random, {a.head_dim, a.head_dim, between(random, 1, 130)});
        q = std::make_unique<Held>(random, a.type, a.batch, a.q_heads, a.q_len, a.head_dim);
        k = std::make_unique<Held>(random, a.type, a.batch, a.kv_heads, a.kv_len, a.head_dim);
        v = std::make_unique<Held>(random, a.type, a.batch, a.kv_heads, a.kv_len, a.v_dim);
        a.q = q->tensor, a.k = k->tensor, a.v = v->tensor;
        a.threads = int(between(random, 1, 3));
        draw_bounds();
        draw_scores();
        for (int64_t b = 0; b < a.batch; b++)
            for (int64_t j = 0; j < a.kv_len; j++)
                if (!any_row_sees(b, j)) k->poison(b, j), v->poison(b, j);
    }

    // The largest error over what is allowed.
    double forward(void (*operation)(const Forward&)) {
        int64_t rows = a.batch * a.q_heads * a.q_len, size = a.type == Type::float64 ? 8 : 4;
        std::unique_ptr<char[]> out(new char[rows * a.v_dim * size]), lse(new char[rows * size]);
        Forward call{a, out.get(), lse.get()};
        operation(call);
        if (outs.expected.empty()) expect();
        Type type = size == 8 ? Type::float64 : Type::float32;
        outs.found.clear(), lses.found.clear();
        for (int64_t i = 0; i < rows * a.v_dim; i++) outs.found.push_back(get(type, out.get(), i));
        for (int64_t i = 0; i < rows; i++) lses.found.push_back(get(type, lse.get(), i));
        double loose = a.type == Type::bfloat16 ? 2e-3 : 2e-6, tight = a.type == Type::bfloat16 ? 1e-5 : 2e-6;
        if (size == 8) loose = tight = 1e-13;
        return std::max(outs.error() / loose, lses.error() / tight);
    }

    void print() const {
        std::printf("type %d batch %ld heads %ld/%ld lengths %ld %ld dims %ld %ld scale %g softcap %g alibi %d dropout %g\n",
                    int(a.type), long(a.batch), long(a.q_heads), long(a.kv_heads), long(a.q_len), long(a.kv_len),
                    long(a.head_dim), long(a.v_dim), a.scale, a.softcap, a.alibi_slopes != nullptr, a.dropout_p);
    }

private:
    Random random;
    Attention a{};
    std::unique_ptr<Held> q, k, v;
    std::vector<int64_t> lo, hi, rows, keys, own;
    std::vector<float> slopes;
    Compared outs, lses;

    void draw_bounds() {
        int64_t masks = random() % 2 ? a.batch : 1, kind = random() % 4, shift = between(random, -5, a.kv_len);
        a.bounds_batch = masks > 1 ? a.q_len : 0;
        for (int64_t i = 0; i < masks * a.q_len; i++) {
            int64_t one = between(random, 0, a.kv_len), other = between(random, 0, a.kv_len), row = i % a.q_len + shift;
            lo.push_back(kind == 0 ? std::min(one, other) : kind == 3 ? std::min(std::max(row - 30, int64_t(0)), a.kv_len) : 0);
            hi.push_back(kind == 0 ? std::max(one, other) : kind == 1 ? a.kv_len : std::min(std::max(row, int64_t(0)), a.kv_len));
        }
        a.lo = lo.data(), a.hi = hi.data();
    }

    void draw_scores() {
        a.scale = random() % 8 ? 1 / std::sqrt(double(a.head_dim)) : -0.3;
        a.softcap = random() % 5 ? 0.0 : 3.0;
        if (random() % 5 == 0) {
            for (int64_t h = 0; h < a.q_heads; h++) slopes.push_back(0.01f * float(h + 1));
            a.alibi_slopes = slopes.data();
        }
        a.dropout_p = random() % 5 ? 0.0 : 0.3;
        a.seed = random(), a.first_head = int64_t(random() % 3);
        for (int64_t i = 0; i < a.q_len; i++) rows.push_back(7 * i), own.push_back(3 * i);
        for (int64_t j = 0; j < a.kv_len; j++) keys.push_back(2 * j + 1);
        a.rows = rows.data(), a.keys = keys.data(), a.own = own.data(), a.own_batch = 0;
    }

    bool sees(int64_t b, int64_t i, int64_t j) const {
        int64_t at = b * a.bounds_batch + i;
        return lo[at] <= j && j < hi[at];
    }
    bool any_row_sees(int64_t b, int64_t j) const {
        for (int64_t i = 0; i < a.q_len; i++)
            if (sees(b, i, j)) return true;
        return false;
    }

    static double dot(const std::vector<double>& x, const std::vector<double>& y) {
        double sum = 0;
        for (size_t d = 0; d < x.size(); d++) sum += x[d] * y[d];
        return sum;
    }

    double score(int64_t h, int64_t i, int64_t j, double product) const {
        double s = a.scale * product;
        if (a.softcap != 0) s = a.softcap * std::tanh(s / a.softcap);
        if (a.alibi_slopes != nullptr) s -= double(slopes[h]) * double(std::abs(own[i] - keys[j]));
        return s;
    }

    double kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
        if (a.dropout_p == 0) return 1;
        uint64_t word = mixed(uint64_t(b) + a.seed * 0x9E3779B97F4A7C15u);
        for (int64_t counter : {a.first_head + h, rows[i], keys[j]}) word = mixed(word + uint64_t(counter + 1) * 0x9E3779B97F4A7C15u);
        return double(word >> 40) / double(1 << 24) >= a.dropout_p ? 1 / (1 - a.dropout_p) : 0;
    }

    void expect() {
        for (int64_t b = 0; b < a.batch; b++)
            for (int64_t h = 0; h < a.q_heads; h++) {
                std::vector<std::vector<double>> of_k, of_v;
                for (int64_t j = 0; j < a.kv_len; j++) {
                    of_k.push_back(k->row(b, h / (a.q_heads / a.kv_heads), j));
                    of_v.push_back(v->row(b, h / (a.q_heads / a.kv_heads), j));
                }
                for (int64_t i = 0; i < a.q_len; i++) expect_row(b, h, i, of_k, of_v);
            }
    }

    void expect_row(int64_t b, int64_t h, int64_t i, const std::vector<std::vector<double>>& of_k,
                    const std::vector<std::vector<double>>& of_v) {
        std::vector<double> of_q = q->row(b, h, i), s(a.kv_len), sum(a.v_dim), size(a.v_dim);
        double top = -INFINITY, total = 0;
        for (int64_t j = 0; j < a.kv_len; j++)
            if (sees(b, i, j)) top = std::max(top, s[j] = score(h, i, j, dot(of_q, of_k[j])));
        for (int64_t j = 0; j < a.kv_len; j++) {
            if (!sees(b, i, j)) continue;
            double weight = std::exp(s[j] - top);
            total += weight, weight *= kept(b, h, i, j);
            for (int64_t d = 0; d < a.v_dim; d++) sum[d] += weight * of_v[j][d], size[d] += weight * std::abs(of_v[j][d]);
        }
        for (int64_t d = 0; d < a.v_dim; d++) {
            outs.expected.push_back(total == 0 ? 0 : sum[d] / total);
            outs.size.push_back(total == 0 ? 0 : size[d] / total);
        }
        lses.expected.push_back(total == 0 ? -INFINITY : top + std::log(total));
        lses.size.push_back(std::max(1.0, std::abs(lses.expected.back())));
    }
};

struct InstructionSet {
    const char* name;
    bool (*runs_here)();
    const Kernels* kernels;
};

}  // namespace

int main(int count, char** words) {
    uint64_t cases = count > 1 ? std::strtoull(words[1], nullptr, 10) : 1000;
    uint64_t first = count > 2 ? std::strtoull(words[2], nullptr, 10) : 0;
#define ROW(isa) {#isa, runs_here::isa, &isa::kernels},
    std::vector<InstructionSet> sets;
    for (const InstructionSet& set : std::initializer_list<InstructionSet>{SHARDSUM_EACH_ISA(ROW)})
        if (set.runs_here()) sets.push_back(set);
    for (uint64_t seed = first; seed < first + cases; seed++) {
        Problem problem(seed);
        for (const InstructionSet& set : sets) {
            for (const auto& [name, operation] : {std::pair{"prefill", set.kernels->prefill}, std::pair{"decode", set.kernels->decode}}) {
                double error = problem.forward(operation);
                if (error <= 1) continue;
                std::printf("seed %lu, %s, %s: %.1f times what is allowed\n", (unsigned long)seed, set.name, name, error);
                problem.print();
                return 1;
            }
        }
    }
    std::printf("%lu problems right, on", (unsigned long)cases);
    for (const InstructionSet& set : sets) std::printf(" %s", set.name);
    std::printf("\n");
}
