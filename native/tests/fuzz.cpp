// Random problems for every operation of every instruction set that runs here, against sums written out in double.
//
//     fuzz [cases] [first seed]
//
// Tensors lie in memory of exactly their size, so that an address sanitizer sees every element read beyond it, and keys
// that no row sees hold NaN. Exit status 1 and a line for the first problem that is not right.
#include <algorithm>
#include <cstdio>
#include <utility>

#include "../machine.h"
#include "tensors.h"

#define DECLARE(isa) namespace isa { extern const Kernels kernels; }
SHARDSUM_EACH_ISA(DECLARE)

namespace {

class Problem {
public:
    explicit Problem(uint64_t seed) : random(seed) {
        a.type = Type(random() % 5);
        a.batch = between(random, 1, 3);
        a.kv_heads = between(random, 1, 3);
        a.q_heads = a.kv_heads * between(random, 1, 5);
        a.q_len = pick(random, {1, 1, 2, between(random, 1, 40), between(random, 1, 400)});
        a.kv_len = pick(random, {1, 2, between(random, 1, 60), between(random, 1, 900)});
        a.head_dim = pick(random, {64, 80, 128, between(random, 1, 40), between(random, 1, 200)});
        a.v_dim = pick(random, {a.head_dim, a.head_dim, between(random, 1, 130)});
        q = std::make_unique<Held>(random, a.type == Type::int8 ? Type::float32 : a.type, a.batch, a.q_heads, a.q_len, a.head_dim);
        if (a.type != Type::int8 && random() % 4 == 0) draw_pages();
        const int64_t pages = paged() ? int64_t(table.size()) : a.batch, rows = paged() ? a.page_len : a.kv_len;
        k = std::make_unique<Held>(random, a.type, pages, a.kv_heads, rows, a.head_dim);
        v = std::make_unique<Held>(random, a.type, pages, a.kv_heads, rows, a.v_dim);
        a.q = q->tensor, a.k = k->tensor, a.v = v->tensor;
        a.k_scales = k->of_scales(), a.v_scales = v->of_scales();
        a.threads = int(between(random, 1, 3));
        draw_bounds();
        draw_scores();
        for (int64_t b = 0; b < a.batch; b++)
            for (int64_t j = 0; j < a.kv_len; j++)
                if (!any_row_sees(b, j)) k->poison(page_of(b, j), row_of(j)), v->poison(page_of(b, j), row_of(j));
        segment = pick(random, {256, 256, 512});
    }

    // Decode alone takes int8, and pages.
    bool for_decode_alone() const { return a.type == Type::int8 || paged(); }

    // The largest error over what is allowed.
    double forward(void (*operation)(const Forward&), bool by_segments = false) {
        int64_t rows = a.batch * a.q_heads * a.q_len, size = a.type == Type::float64 ? 8 : 4;
        std::unique_ptr<char[]> out(new char[rows * a.v_dim * size]), lse(new char[rows * size]);
        Forward call{a, out.get(), lse.get()};
        call.segment = by_segments ? segment : 0;
        operation(call);
        if (outs.expected.empty()) expect();
        Type type = size == 8 ? Type::float64 : Type::float32;
        outs.found.clear(), lses.found.clear();
        for (int64_t i = 0; i < rows * a.v_dim; i++) outs.found.push_back(get(type, out.get(), i));
        for (int64_t i = 0; i < rows; i++) lses.found.push_back(get(type, lse.get(), i));
        double loose = a.type == Type::bfloat16 ? 2e-3 : 2e-6, tight = a.type == Type::bfloat16 ? 1e-5 : 2e-6;
        if (size == 8) loose = tight = 1e-13;
        // Queries and weights may be rounded to 16 bits: scores of 30 are then uncertain by 30 * 2^-16.
        if (a.type == Type::int8) loose = tight = 5e-4;
        return std::max(outs.error() / loose, lses.error() / tight);
    }

    // The same for the gradients; `forward` comes before it.
    double backward(void (*operation)(const Backward&), bool by_segments = false) {
        const int64_t sizes[3] = {count_of(q), count_of(k), count_of(v)}, rows = a.batch * a.q_heads * a.q_len;
        const Type type = a.type == Type::float64 ? Type::float64 : Type::float32;
        const int64_t bytes = SIZES[int(type)];
        auto copied = [&](const std::vector<double>& from) {
            std::unique_ptr<char[]> to(new char[from.size() * bytes]);
            for (size_t i = 0; i < from.size(); i++) put(type, to.get(), i, from[i]);
            return to;
        };
        std::unique_ptr<char[]> of_out = copied(d_out), of_lse = copied(lses.expected), of_delta = copied(delta), found[3];
        for (int g = 0; g < 3; g++) found[g].reset(new char[sizes[g] * bytes]());
        Backward call{a, of_out.get(), of_lse.get(), of_delta.get(), found[0].get(), found[1].get(), found[2].get()};
        call.segment = by_segments ? segment : 0;
        operation(call);
        double largest = 1, worst = 0;
        for (int64_t i = 0; i < rows; i++)
            if (std::isfinite(lses.expected[i])) largest = std::max(largest, std::abs(lses.expected[i]) / 3);
        for (int g = 0; g < 3; g++) {
            gradients[g].found.clear();
            for (int64_t i = 0; i < sizes[g]; i++) gradients[g].found.push_back(get(type, found[g].get(), i));
            // exp(s - lse) is uncertain by as much as s is: of 12, summed of 92 products in float, by up to 5.4e-6.
            double allowed = a.type == Type::float64 ? 1e-13 * largest : a.type == Type::bfloat16 ? 3e-3 : 2e-6 * largest;
            worst = std::max(worst, gradients[g].error() / allowed);
        }
        return worst;
    }

    void print() const {
        std::printf("type %d batch %ld heads %ld/%ld lengths %ld %ld dims %ld %ld scale %g softcap %g alibi %d dropout %g page_len %ld\n",
                    int(a.type), long(a.batch), long(a.q_heads), long(a.kv_heads), long(a.q_len), long(a.kv_len),
                    long(a.head_dim), long(a.v_dim), a.scale, a.softcap, a.alibi_slopes != nullptr, a.dropout_p, long(a.page_len));
    }

private:
    Random random;
    Attention a{};
    int64_t segment = 0;
    std::unique_ptr<Held> q, k, v;
    std::vector<int64_t> lo, hi, rows, keys, diagonal, table;
    std::vector<double> slopes;
    Compared outs, lses, gradients[3];  // of q, k, v
    std::vector<double> d_out, delta;

    static int64_t count_of(const std::unique_ptr<Held>& x) { return x->batch * x->heads * x->length * x->dim; }

    // Every sequence has pages of its own, all in any order; the last one may not be full.
    void draw_pages() {
        a.page_len = pick(random, {1, 16, between(random, 1, 20), between(random, 1, 300)});
        a.pages_batch = (a.kv_len + a.page_len - 1) / a.page_len;
        for (int64_t p = 0; p < a.batch * a.pages_batch; p++) table.push_back(p);
        std::shuffle(table.begin(), table.end(), random);
        a.pages = table.data();
    }
    bool paged() const { return a.pages != nullptr; }
    int64_t page_of(int64_t b, int64_t j) const { return paged() ? table[b * a.pages_batch + j / a.page_len] : b; }
    int64_t row_of(int64_t j) const { return paged() ? j % a.page_len : j; }

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
        for (int64_t i = 0; i < a.q_len; i++) rows.push_back(7 * i), diagonal.push_back(3 * i);
        for (int64_t j = 0; j < a.kv_len; j++) keys.push_back(2 * j + 1);
        a.rows = rows.data(), a.keys = keys.data(), a.diagonal = diagonal.data(), a.diagonal_batch = 0;
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

    static double dot_of_sizes(const std::vector<double>& x, const std::vector<double>& y) {
        double sum = 0;
        for (size_t d = 0; d < x.size(); d++) sum += std::abs(x[d] * y[d]);
        return sum;
    }

    // Of a score, by the product.
    double derivative(double product) const {
        double tanh = a.softcap == 0 ? 0 : std::tanh(a.scale * product / a.softcap);
        return a.scale * (1 - tanh * tanh);
    }

    double score(int64_t h, int64_t i, int64_t j, double product) const {
        double s = a.scale * product;
        if (a.softcap != 0) s = a.softcap * std::tanh(s / a.softcap);
        if (a.alibi_slopes != nullptr) s -= slopes[h] * double(std::abs(diagonal[i] - keys[j]));
        return s;
    }

    double kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
        if (a.dropout_p == 0) return 1;
        uint64_t word = mixed(uint64_t(b) + a.seed * 0x9E3779B97F4A7C15u);
        for (int64_t counter : {a.first_head + h, rows[i], keys[j]}) word = mixed(word + uint64_t(counter + 1) * 0x9E3779B97F4A7C15u);
        return double(word >> 40) / double(1 << 24) >= a.dropout_p ? 1 / (1 - a.dropout_p) : 0;
    }

    void expect() {
        const std::unique_ptr<Held>* of[3] = {&q, &k, &v};
        for (int g = 0; g < 3; g++) gradients[g].expected = gradients[g].size = std::vector<double>(count_of(*of[g]));
        for (int64_t b = 0; b < a.batch; b++)
            for (int64_t h = 0; h < a.q_heads; h++) {
                std::vector<std::vector<double>> of_k, of_v;
                for (int64_t j = 0; j < a.kv_len; j++) {
                    of_k.push_back(k->row(page_of(b, j), h / (a.q_heads / a.kv_heads), row_of(j)));
                    of_v.push_back(v->row(page_of(b, j), h / (a.q_heads / a.kv_heads), row_of(j)));
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
        expect_gradients(b, h, i, s, of_k, of_v);
    }

    // Adds what one row gives, its out and lse being the last that were expected.
    void expect_gradients(int64_t b, int64_t h, int64_t i, const std::vector<double>& s, const std::vector<std::vector<double>>& of_k,
                          const std::vector<std::vector<double>>& of_v) {
        std::normal_distribution<double> normal;
        const bool seeing = std::isfinite(lses.expected.back());
        std::vector<double> of_q = q->row(b, h, i), of_out(a.v_dim);
        double of_lse = normal(random), sum = seeing ? -of_lse : 0;
        for (double& x : of_out) x = rounded(a.type, normal(random));
        for (int64_t d = 0; d < a.v_dim; d++) sum += of_out[d] * outs.expected[outs.expected.size() - a.v_dim + d];
        d_out.insert(d_out.end(), of_out.begin(), of_out.end());
        delta.push_back(sum);
        const int64_t row = (b * a.q_heads + h) * a.q_len + i, head = b * a.kv_heads + h / (a.q_heads / a.kv_heads);
        // As the kernel gets it.
        const double lse = a.type == Type::float64 ? lses.expected.back() : double(float(lses.expected.back()));
        for (int64_t j = 0; j < a.kv_len; j++) {
            if (!sees(b, i, j)) continue;
            double weight = std::exp(s[j] - lse), keep = kept(b, h, i, j), by_product = derivative(dot(of_q, of_k[j]));
            double by_score = weight * by_product * (dot(of_out, of_v[j]) * keep - sum);
            double size = weight * std::abs(by_product) * (dot_of_sizes(of_out, of_v[j]) * keep + std::abs(sum));
            add(gradients[0], row * a.head_dim, by_score, size, of_k[j]);
            add(gradients[1], (head * a.kv_len + j) * a.head_dim, by_score, size, of_q);
            add(gradients[2], (head * a.kv_len + j) * a.v_dim, weight * keep, weight * keep, of_out);
        }
    }

    static void add(Compared& to, int64_t at, double factor, double size, const std::vector<double>& row) {
        for (size_t d = 0; d < row.size(); d++) to.expected[at + d] += factor * row[d], to.size[at + d] += size * std::abs(row[d]);
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
            std::vector<std::pair<const char*, double>> errors{{"decode", problem.forward(set.kernels->decode)}};
            if (!problem.for_decode_alone()) {
                errors.emplace_back("prefill", problem.forward(set.kernels->prefill));
                errors.emplace_back("tree", problem.forward(set.kernels->tree, true));
                errors.emplace_back("backward", problem.backward(set.kernels->backward));
                errors.emplace_back("backward tree", problem.backward(set.kernels->backward_tree, true));
            }
            for (const auto& [name, error] : errors) {
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
