//! The plain formulas, on nested lists, written from the specification and not from the crate: slow, obvious, independent.

pub type M = Vec<Vec<f64>>;

/// A generator of its own, so that nothing of the crate decides the numbers either.
pub struct Rng(pub u64);

impl Rng {
    pub fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f64 + 0.5) / (1u64 << 31) as f64
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// Uniform on [-spread, spread].
    pub fn list(&mut self, n: usize, spread: f64) -> Vec<f64> {
        (0..n).map(|_| (2.0 * self.unit() - 1.0) * spread).collect()
    }

    pub fn matrix(&mut self, rows: usize, cols: usize, spread: f64) -> M {
        (0..rows).map(|_| self.list(cols, spread)).collect()
    }
}

pub fn softmax(row: &[f64]) -> Vec<f64> {
    let total: f64 = row.iter().map(|z| z.exp()).sum();
    row.iter().map(|z| z.exp() / total).collect()
}

pub fn softmaxes(m: &M) -> M {
    m.iter().map(|row| softmax(row)).collect()
}

pub fn lse(row: &[f64]) -> f64 {
    row.iter().map(|z| z.exp()).sum::<f64>().ln()
}

pub fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// The k largest by taking the first maximum k times.
pub fn best(row: &[f64], k: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::new();
    for _ in 0..k {
        let mut top: Option<usize> = None;
        for i in 0..row.len() {
            if !chosen.contains(&i) && top.is_none_or(|t| row[i] > row[t]) {
                top = Some(i);
            }
        }
        chosen.extend(top);
    }
    chosen
}

pub fn all_best(m: &M, k: usize) -> Vec<Vec<usize>> {
    m.iter().map(|row| best(row, k)).collect()
}

pub fn column_means(m: &M) -> Vec<f64> {
    (0..m[0].len()).map(|e| m.iter().map(|row| row[e]).sum::<f64>() / m.len() as f64).collect()
}

pub fn column_sums(m: &M) -> Vec<f64> {
    (0..m[0].len()).map(|e| m.iter().map(|row| row[e]).sum::<f64>()).collect()
}

/// Selections per token and expert; sums to k.
pub fn fractions(chosen: &[Vec<usize>], experts: usize) -> Vec<f64> {
    (0..experts).map(|e| chosen.iter().filter(|c| c.contains(&e)).count() as f64 / chosen.len() as f64).collect()
}

pub fn counts(chosen: &[Vec<usize>], experts: usize) -> Vec<usize> {
    (0..experts).map(|e| chosen.iter().filter(|c| c.contains(&e)).count()).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

pub fn times(a: &M, b: &M) -> M {
    a.iter().map(|row| (0..b[0].len()).map(|j| (0..b.len()).map(|i| row[i] * b[i][j]).sum()).collect()).collect()
}

pub fn transposed(a: &M) -> M {
    (0..a[0].len()).map(|j| a.iter().map(|row| row[j]).collect()).collect()
}

/// `(E/k) sum f P`.
pub fn balance(chosen: &[Vec<usize>], p: &M, k: usize) -> f64 {
    let experts = p[0].len();
    experts as f64 / k as f64 * dot(&fractions(chosen, experts), &column_means(p))
}

/// Population: mean square deviation over squared mean.
pub fn cv2(v: &[f64]) -> f64 {
    let n = v.len() as f64;
    let mean = v.iter().sum::<f64>() / n;
    v.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n / (mean * mean + 1e-10)
}

pub fn zeros(rows: usize, cols: usize) -> M {
    vec![vec![0.0; cols]; rows]
}

/// `y_t = sum_e G[t, e] scale_e x_t`.
pub fn scaled(g: &M, x: &M, scale: &[f64]) -> M {
    g.iter().zip(x).map(|(g, x)| x.iter().map(|v| v * dot(g, scale)).collect()).collect()
}

pub fn plus(a: &M, b: &M, weight: impl Fn(usize) -> f64) -> M {
    let row = |(t, (a, b)): (usize, (&Vec<f64>, &Vec<f64>))| a.iter().zip(b).map(|(p, q)| p + weight(t) * q).collect();
    a.iter().zip(b).enumerate().map(row).collect()
}

/// Values at the chosen entries, 0 elsewhere.
pub fn at_chosen(values: &M, chosen: &[Vec<usize>]) -> M {
    let row = |(v, c): (&Vec<f64>, &Vec<usize>)| {
        (0..v.len()).map(|e| if c.contains(&e) { v[e] } else { 0.0 }).collect::<Vec<_>>()
    };
    values.iter().zip(chosen).map(row).collect()
}

/// Rows divided by their sums; rows of zeros stay.
pub fn normalised(m: &M) -> M {
    m.iter()
        .map(|row| {
            let total: f64 = row.iter().sum();
            row.iter().map(|v| if total == 0.0 { 0.0 } else { v / total }).collect()
        })
        .collect()
}

/// Standard normal distribution by Simpson's rule on the density.
pub fn phi(u: f64) -> f64 {
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let (from, n) = (-9.0f64, 1_600);
    if u <= from {
        return 0.0;
    }
    let h = (u - from) / n as f64;
    let inner: f64 = (1..n).map(|i| density(from + i as f64 * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (density(from) + inner + density(u)) * h / 3.0
}

/// Central differences of `f` at a matrix.
pub fn differences(at: &M, f: impl Fn(&M) -> f64) -> M {
    let h = 1e-5;
    let mut out = zeros(at.len(), at[0].len());
    for t in 0..at.len() {
        for e in 0..at[0].len() {
            let mut moved = at.clone();
            moved[t][e] += h;
            let above = f(&moved);
            moved[t][e] -= 2.0 * h;
            out[t][e] = (above - f(&moved)) / (2.0 * h);
        }
    }
    out
}

/// Indices by descending value, equal ones in order.
pub fn descending(v: &[f64]) -> Vec<usize> {
    best(v, v.len())
}

/// Places in the queue: tokens in `order`, first choices before second ones; every choice counts.
pub fn places(chosen: &[Vec<usize>], experts: usize, order: &[usize], k: usize) -> Vec<Vec<usize>> {
    let mut next = vec![0; experts];
    let mut out = vec![vec![0; k]; chosen.len()];
    for j in 0..k {
        for &t in order {
            out[t][j] = next[chosen[t][j]];
            next[chosen[t][j]] += 1;
        }
    }
    out
}
