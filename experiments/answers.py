"""Answers with a known verdict, for the tests of verify.py and for experiments/verifier.py.

answers.jsonl: 423 pairs of gold answer and response, awkward on purpose, and what a fair grader
says by the conventions of MATH, AIME and olympiads. Below: spellings that are right, answers that
are wrong, and hedges. A wrong accept is worse than a wrong refusal: the policy will find it.
"""

import json
import re
from pathlib import Path

PAIRS = [json.loads(line) for line in Path(__file__).with_suffix(".jsonl").open()]

# A line is answer | gold answer.

RIGHT_ANSWERS = r"""
# thousands
1,234 | 1234
1{,}234 | 1234
11,\!111,\!100 | 11111100
1\,234 | 1,234
\$1,\!000 | 1000
# the same number, in delimiters or brackets
34 | 34
34.0 | 34
$34$. | 34
\$34 | 34
\(34\) | 34
(5) | 5
.5 | 0.50
# after a name
x = 34 | 34
N = \frac{68}{2} = 34 | 34
m+n = 34 | 34
\theta = 5 | 5
P(A) = 0.5 | 0.5
a_{1} = 5 | 5
y=-2x | -2x
2x | f(x)=2 x
# with a unit
34 \text{ cm}^2 | 34
34 \mathrm{~m/s^{2}} | 34
34 dollars | 34
34^{\circ} | 34
5 \mathrm{\mu m} | 5
5 \text{ m/s} | 5
5 miles/hour | 5
5 inches | 5
34 feet squared | 34
18^{\circ}\text{C} | 18
34 times | 34
# per cent
62.5 | 62.5\%
0.625 | 62.5%
50\% | 0.5
50\% | 50%
# fractions
\dfrac12 | \frac{1}{2}
0.5 | \frac{1}{2}
1/2 | 0.5
1\frac{4}{5} | 9/5
-\frac{1}{3} | \frac{-1}{3}
\frac{270}7 | \frac{270}{7}
1\frac12 | 1.5
# powers of ten
4.5 \times 10^{33} | 4.5e33
10^{-5} | 1e-5
5 \cdot 10^{3} | 5000
10^3 | 1000
3 \times 10^{-2} | .03
# letters and words
\text{(C)} | C
C | (C)
\text{ Evelyn } | Evelyn
East | east
\text{even} | even
# lists and sets, in any order
3, 1 | 1,3
\{1, 3\} | 3,1
1 \text{ and } 3 | 1,3
8,5 | 5,8
1+\sqrt{5}, 1-\sqrt5 | 1\pm\sqrt{5}
# tuples, intervals and unions
(6, 5) | (6,5)
\left( 1, \frac{1}{2} \right) | (1,0.5)
\left(45^\circ, 60^\circ\right) | (45^{\circ}, 60^{\circ})
(1,2),(3,4) | (3,4), (1,2)
[-2, 7] | [-2,7]
x \in [-2,7] | [-2,7]
(3,\infty)\cup(-\infty,2) | (-\infty,2)\cup(3,\infty)
# formulas
\begin{bmatrix}1\\2\end{bmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
2(k+1) | 2k+2
2r \pi | 2\pi r
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
0.5\pi | \frac{\pi}{2}
k \ge 2 | k \geqslant 2
(b+2)(a+5) | (a+5)(b+2)
2y=4x+2 | y-2x=1
4210_{5} | 4210_5
\binom{2n}{n} | \frac{(2n)!}{(n!)^2}
# neighbours of what was once refused: matrices, huge powers, ranges, names, units, degrees
\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix} | \begin{pmatrix}-2\\-14\\-7\end{pmatrix}
\begin{bmatrix} -2 \\[4pt] -14 \\[4pt] -7 \end{bmatrix} | \begin{pmatrix}-2\\-14\\-7\end{pmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix}-1&0\\0&-1\end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{pmatrix}-\frac13\\\frac23\end{pmatrix}
\begin{pmatrix} -\dfrac13 \\[6pt] \dfrac{2}{3} \end{pmatrix} | \begin{pmatrix}-1/3\\2/3\end{pmatrix}
\left(\begin{array}{c} -2 \\ -14 \end{array}\right) | \begin{pmatrix}-2\\-14\end{pmatrix}
\mathbf{v} = \begin{pmatrix} -2 \\ -14 \\ \end{pmatrix} | \begin{pmatrix}-2\\-14\end{pmatrix}
\frac{1}{2^{2025}}+\frac12 | \frac{2^{2024}+1}{2^{2025}}
\frac{2^{2023}-1}{2^{2023}} | 1-2^{-2023}
2 \cdot 2^{2023} | 2^{2024}
4^{1012} | 2^{2024}
100 \cdot 99! | 100!
(2,+\infty) | (2,\infty)
\left(-\infty, 0\right] | (-\infty,0]
x > 2 | (2,\infty)
(x,y) = (2,4) | (2,4)
P = (2,4) | (2,4)
S=\{1,2\} | \{1,2\}
D=(0,1) | (0,1)
\lambda \in [0,1] | [0,1]
(x, y) \in \{(1,2),(3,4)\} | (1,2),(3,4)
y=1-x | x+y=1
2x+2y=2 | x+y=1
x-y+3=0 | y=x+3
\frac35+\frac45i | \frac{3+4i}{5}
2i\sqrt3 | 2\sqrt3i
3\cdot i | 3i
i\sqrt{3}+1 | 1+\sqrt{3}i
\frac{3}{5} + \frac{4}{5}i | \frac{3+4i}{5}
2 \le x < 5 | [2,5)
[2,5) | 2 \le x < 5
5 > x \ge 2 | [2,5)
x<-1 \text{ or } x>1 | (-\infty,-1)\cup(1,\infty)
f(2)=12 | 12
\angle ABC=12^\circ | 12
\text{Area}=12 | 12
P(X=3)=\frac14 | \frac{1}{4}
{2} | 2
\{5\} | 5
\frac{7}{-3} | -\frac73
2.\overline{3} | \frac73
0.1\overline{6} | \frac16
\tfrac7{12} | \frac{7}{12}
{3\over 4} | \frac34
\varnothing | \emptyset
\lvert x\rvert | |x|
12\text{ m/s^2} | 12
12 mL | 12
12 N | 12
12 hr | 12
\textbf{(C)}\ 12 | C
Option C | C
\text{(C) }12 | C
\sin(10^\circ) | \sin 10^\circ
\sin 10° | \sin{10^\circ}
36 \text{ square cm} | 36 \text{ cm}^2
20 \text{ min} | 20\text{ minutes}
18^\circ C | 18
18 \text{ degrees} | 18^\circ
6:00 | 6:00\text{ AM}
6:00 a.m. | 6:00\text{ AM}
20\%\text{ profit} | 20\% \text{ profit}
x < -1 \text{ or } x > 1 | x>1 \text{ or } x<-1
-\frac{1}{2} < x < \frac12 | (-\frac12,\frac12)
\sqrt{2+\sqrt3} | \frac{\sqrt6+\sqrt2}{2}
\frac{\sqrt[3]{4}}{2} | \frac{1}{\sqrt[3]{2}}
n! | n(n-1)!
\frac{n!}{2} | \frac{n(n-1)!}{2}
x^2+2x+1 | (x+1)^2
\sin 2x | 2\sin x\cos x
4\sqrt{3}\text{ cm} | 4\sqrt{3}
x = 2, y = 4 | (2,4)
\$5 | 5 \text{ dollars}
\frac{\pi}{3} \text{ radians} | \frac{\pi}{3}
5 \text{ ways} | 5
-2 \leq k \leq 7 | k \in [-2,7]
x \in (-\infty, \infty) | \mathbb{R}
x \in \mathbb{R} | \mathbb{R}
2x+3y < 6 | 4x+6y<12
\binom{100}{50} | \frac{100!}{50! 50!}
7 \text{ or } 8 | 7,8
3\text{ hours }20\text{ minutes} | 3 hours 20 minutes
\text{right triangle} | right triangle
f(x) = x+1 | x+1
x > 2 \text{ and } x < 5 | x<5 \text{ and } x>2
\{x \mid x > 2\} | (2,\infty)
\angle A = 30^\circ | 30^\circ
12\ \mathrm{kg\,m/s^2} | 12
(B)\ \frac{1}{2} | B
2:3 | 2:3
x+0.1+0.2 | x+0.3
y - 3 = 2(x-1) | y=2x+1
\sqrt{7+4\sqrt3} | 2+\sqrt3
# what strangers wrote
C. 12 | C
\text{C) } \frac{1}{2} | C
€500 | 500
\pounds 1,200.50 | 1200.5
\{x \in \mathbb{R} : 0 \le x < 1\} | [0,1)
\left\langle 1, -2 \right\rangle | (1,-2)
\left[\begin{matrix} 1 & 2 \\ 3 & 4\end{matrix}\right] | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\dbinom{10}{5} | \binom{10}{5}
n \equiv 1 \pmod {4} | n\equiv 1\pmod 4
\frac{1}{2}\\ | \frac12
\{1,2\}, \{3\} | \{3\},\{1,2\}
34 \text{ binary strings} | 34
34 \text{ wrong answers} | 34
3 real roots | 3
No | no
\frac{\omega}{2\pi} | \frac{1}{2\pi}\omega
"""

WRONG_ANSWERS = r"""
# another number: there is no tolerance
35 | 34
-34 | 34
-\frac{1}{2} | \frac{1}{2}
0.33 | \frac{1}{3}
0.3333333333333333 | 1/3
1e-9 | 1e-8
1024.0000001 | 2^{10}
1.41421356 | \sqrt{2}
0.00000001 | 2^{-40}
1\frac{-4}{5} | \frac{1}{5}
# two numbers, or a hedge
3 4 | 34
3 4 | 7
1, 234 | 1234
33, 34, 35 | 34
33 or 34 | 34
34 \text{ or } 35 | 34
12 \text{ or } 13 | 12
12 13 | 12
12; 13 | 12
1 2 | 12
1,2,3 | 123
34 or more | 34
34 \text{ or more} | 34
5 \text{ but maybe 7} | 5
\pm 34 | 34
33-34 | 34
\boxed{3}, 34 | 34
# a word or a letter that changes the number
34 million | 34
34x | 34
34\text{}^2 | 34
34 squared | 34
34 plus five | 34
34 \text{ minus one} | 34
34 point five | 34
34 sin x | 34
34 thirds | 34
5\mathrm{i} | 5
5 \text{x} | 5
5\text{/x} | 5
5 \mathrm{\pi} | 5
5\text{$\pi$} | 5
5 times x | 5
12abc | 12
# what is dropped between digits must not join them
3$4 | 34
3\(4 | 34
3\left4 | 34
3°4 | 34
3^\circ 4 | 34
\text{12}3 | 123
# the question repeated: the verifier would do the arithmetic
\sqrt{1156} | 34
\sum_{k=1}^{9} k | 45
\arcsin(-\frac12) | -\frac{\pi}{6}
\cos(\pi/6) | \frac{\sqrt{3}}{2}
(3!)^2x | 36
k+\gcd(2,3) | k+1
\int_0^1 2x dx + k | k+1
# per cent
0.5% | 50%
5000\% | 50\%
# powers of ten
510^3 | 5000
210^{2} | 200
10^{10^{10}} | 10
# too large, infinite, undefined
1e400 | 5
1e999 | 10
NaN | 5
\infty | 5
inf | 5
nan | NaN5
\infty-\infty | 0
x\cdot\infty | x
(5,\infty+1) | (5,\infty)
\nan | 5
0/0 | 0
\frac{x}{x-x} | x
1 / 0 | 0
\frac{1}{0} | 5
\frac{k}{0} | \frac{2k}{0}+k
# what a lenient parser of numbers would take
1_0 | 10
0,123 | 123
|34| | 34
34? | 34
\1 1/2 | \frac{11}{2}
# other scripts, other signs, zero-width spaces, a long s, a Cyrillic letter
３４ | 34
3\u200b4 | 34
34\u200b | 34
−34 | -34
–34 | -34
2х | 2x
ｘ | x
eaſt | east
³ | 3
x² | x^2
½ | 0.5
٣٤ | 34
# TeX that hides something
\input{34} | 34
\def\x{34}\x | 34
\x34 | 34
# negated, or nothing
\not=34 | 34
\neq=5 | 5
$$ | (1,2)
# assignments: every link has to be right, of the same name
x = 33 = 34 | 34
m = 3 | k = 3
# lists, in any order, but with all members
1,2,2 | 1,2
1 | 1,2
1,2,3 | 1,2
1,1 | 1,2
2k+2, 2k+3 | 2k+2
# tuples and intervals, in their order, with their brackets
(2,1) | (1,2)
[1,2] | (1,2)
1,2 | (1,2)
(1,3) | (1,2)
(8,-2) | (9,-2)
[1,2) | [1,2]
(1,2,3) | (1,2)
((1,2),3) | (1,2,3)
(312123231) | (312,123,231)
# letters and words
seat | east
m | M
2m+1 | 2M+1
A, B, C, D | C
even, odd | even
ABCD | C
# formulas
2k+3 | 2k+2
2k+2 \lor 2k+3 | 2k+2
2k+2\approx 3 | 2k+2
10^{-9}\pi | 10^{-8}\pi
10^{-21}\pi | 10^{-20}\pi
1=0 | x+1=x
0y=0x | 2y=4x+2
xy=xy | 2y=4x+2
k>2 | k \ge 2
k \le 2 | k \ge 2
y=-2x | y'=-2x
-\frac{dx}{dt}=kx | \frac{dx}{dt}=kx
4210_7 | 4210_5
4210 | 4210_5
c(\gamma^2-7) | c(\gamma^2-1)
\begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}1\\3\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
# what is close to them and means something else
\frac{1}{2^{2024}} | \frac{2^{2024}+1}{2^{2025}}
\frac12 | \frac{2^{2024}+1}{2^{2025}}
1-2^{-2024} | 1-2^{-2023}
1 | 1-2^{-2023}
2^{2024}+1 | 2^{2024}
100!+1 | 100!
\sqrt{2^{4048}+1} | 2^{2024}
\pi+10^{-60} | \pi
\sqrt{2}+10^{-200} | \sqrt{2}
\sqrt{2} + 2^{-5000} | \sqrt{2}
k + 10^{-300} | k
x(1+10^{-30}) | x
e a s t | east
e a s t | \text{east}
s e a t | east
\text{e a s t} | east
r i g h t triangle | right triangle
x<-1 \text{ and } x>1 | x<-1 \text{ or } x>1
x<-1 \text{ or } x>1 | x<-1 \text{ and } x>1
6:00\text{ PM} | 6:00\text{ AM}
20\%\text{ loss} | 20\%\text{ profit}
30^\circ\text{F} | 30^\circ\text{C}
\sin 10 | \sin 10^\circ
\sin 10^\circ | \sin 10
30 \text{ radians} | 30^\circ
5 \text{ cm} | 5 \text{ m}
5 km | 5\text{ m}
5 \text{ cm}^2 | 5 \text{ cm}^3
5 \text{ apples} | 5 \text{ oranges}
y=2-x | x+y=1
2x+2y=1 | x+y=1
x-y-3=0 | y=x+3
0=0 | y=x+3
x=x | y=x+3
xy=yx | x+y=1
\frac35-\frac45i | \frac{3+4i}{5}
3 | 3i
-9 | 9i^2
(2,5] | [2,5)
2 < x < 5 | [2,5)
2 \le x \le 5 | [2,5)
x \ge 2 | [2,5)
x < 2 | (2,\infty)
(2,\infty) | x \ge 2
(-2,\infty) | (2,\infty)
(2,-\infty) | (2,\infty)
t > 2 | x > 2
2x=12 | 12
12x = 12 | 12
x^2 = 12 | 12
x^2+x = 12 | 12
x+1=12 | 12
\sqrt{x} = 12 | 12
\frac{x}{2} = 12 | 12
-x = 12 | 12
f(2)=13 | 12
f(2)=12 | f(3)=12
x \approx 12 | 12
x \neq 12 | 12
x > 12 | 12
13 = x | 12
3 \times 5 = 12 | 12
12 = 3 \times 5 | 12
4 + 8 | 12
\not= 12 | 12
not = 12 | 12
# a capital Greek letter or name is another one
\Omega | \omega
\delta | \Delta
\lambda | \theta
mv | Mv
# a tautology; sets of sets
x+3 = x+3 | y=x+3
\{x \in \mathbb{R} : y > 2\} | (2,\infty)
\{\{1\},\{2\}\} | \{1,2\}
\{1,\{2\}\} | \{1,2\}
# words that change the number, or take it back
34\%\% | 34\%
34\text{ lakh} | 34
34\text{ tenths} | 34
34\text{ mod seven} | 34
34\text{ twice} | 34
34\text{ tenfold} | 34
34\text{ doubled} | 34
34\text{ square root} | 34
34\text{ reciprocal} | 34
34\text{ choose k} | 34
34\text{ times pi} | 34
34\text{ lots of pi} | 34
34\text{ in binary} | 34
0.3\text{ recurring} | 0.3
34\text{ perhaps} | 34
34\text{ is wrong} | 34
34\text{ at least} | 34
34\text{ if even} | 34
34\text{ except} | 34
six = 12 | 12
\{\emptyset\} | \emptyset
\{\{5\}\} | \{5\}
\{5,6\} | 5
\frac{-7}{-3} | -\frac73
2.\overline{3}4 | \frac73
2.\overline{33}1 | \frac73
12 n | 12
12 x | 12
12 k | 12
12i | 12
12 e | 12
12 \pi | 12
12 million | 12
12 \text{ below zero} | 12
12 | 12m
12 | 12 m
12 N | 12M
5m | 5M
(D) 12 | C
(C) D | C
C D | C
(C) or (D) | C
C, D | C
(C)\text{D} | C
C\text{m} | C
Option C or D | C
not C | C
(C) = (D) | C
\text{Options A to C} | C
y = 2, x = 4 | (2,4)
x = 4, y = 2 | (2,4)
x = 2, x = 4 | (2,4)
2, 4 | (2,4)
\begin{pmatrix}1&2&3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1\\2\\3\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
1\\2 | \begin{pmatrix}1\\2\end{pmatrix}
(1,2) | \begin{pmatrix}1\\2\end{pmatrix}
|\begin{pmatrix}1&2\\3&4\end{pmatrix}| | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
3\text{ hours }20\text{ minutes} | 3\text{ hours}
3\text{ hours }20\text{ minutes} | 20\text{ minutes}
20 \text{ minutes} | 3\text{ hours }20\text{ minutes}
3 hours | 3 hours 20 minutes
LRAC | SRAC=LRAC
SRAC | SRAC=LRAC
A_{16} | 1A_{16}
\frac{1}{2} | \frac{1}{2} mg
\frac{1}{2}\text{ less} | \frac12
2x+3y > 6 | 4x+6y<12
2x+3y \le 6 | 4x+6y<12
-2x-3y < -6 | 2x+3y<6
x | x+0.000000000000000000000000000000000000000000000000000000000000001
\sin x | \sin x + 10^{-70}
\frac{x^2}{x}-x+5 | 6
k^2 | k
\frac{\pi}{6}^\circ | \frac{\pi}{6}
1, 3 | x=1, y=3, z=4
(-\infty,2) | x \neq 2
\overline{3} | 3
\overline{AB} | AB
3.\overline{0}1 | 3
\mathbb{R} | (0,\infty)
\text{all} | 5
5\text{ is wrong, 6} | 5
12 = y | x = 12
k = 2m | k=2n
f(x)=2x | f(x)=2x+1
f(x) = x | x^2
30 \text{ F} | 30^\circ\text{C}
6:00 | 6:30
\frac{12}{x} | 12
a = 12b | 12
\text{Area} = 13 | 12
\text{perimeter} = 12 + x | 12
(1+2i)i^2 | 1
34 `35` | 34
`34` | 35
34`x | 34
12mg | 12
12ns | 12
20\%\text{ loss} | 20\%
m=k/2 | k=2m
\frac{-3+4i}{1+2i} | 1+2i
(1+2i)6-3i | 6+9i
(T) 5 | T
none = 12 | 12
dozen = 12 | 12
\sin^2 10 | \sin^2 10^\circ
\frac{1}{\sin 10} | \frac{1}{\sin 10^\circ}
x>2 \text{ or } x>3 | x>2
x>2 \text{ and } x<3 | (2,3)
y > 2 \text{ or } x<1 | (-\infty,1)\cup(2,\infty)
30 \text{ or } 45^\circ | 30
xy=1 | y=\frac{1}{x}
12 \to 13 | 12
12 \text{ (or 13)} | 12
(3,4,5) | x=3, y=4
\{12|13\} | 12
(k+1) m | k+1
\{12|13\} | 13
(x+y-1)(x-y)=0 | x+y=1
0(x+y)=0 | x+y=1
1000000007^{1000} | 1000000007^{1000}+2
\frac{(2^{20})!}{(2^{20}-1)!}+1 | 2^{20}k
12 \text{ AM} | 12 \text{ PM}
12\text{ km} | 12\text{ mi}
5\text{ north} | 5\text{ south}
\text{The answer is not } 12 | 12
\text{at most }12 | 12
12_8 | 12
F_n | f_n
"""


# G is the gold answer, O another one. Whoever says both has not decided.
HEDGES = r"""
G, O ;; O, G ;; G or O ;; G \text{ or } O ;; G \text{, or maybe } O
G and O ;; G; O ;; G O ;; O G ;; G \lor O ;; G | O ;; G / O
G \\ O ;; G \quad O ;; \{G, O\} ;; (G, O) ;; [G, O] ;; (G), (O)
G = O ;; O = G ;; x = G = O ;; x = G, x = O ;; G \neq O ;; G < O ;; O < G
G \to O ;; G \approx O ;; G \pm O ;; G \cup O ;; O \cup G ;; G. O ;; O. G
G.O ;; G: O ;; G^O ;; G_O ;; G\text{O} ;; \text{G}O
\text{not } G ;; \neg G ;; \neq G ;; G + O ;; G - O
\boxed{G} O ;; O \boxed{G}, O ;; \boxed{G}\boxed{O} ;; G\\boxed{O}
\frac{G}{O} ;; \sqrt{G} ;; -G ;; G + 1 ;; 2 G ;; G\cdot O
G\infty ;; \infty ;; NaN ;; G\u200b ;; G, G ;; G G ;; \pm G ;; G?
\frac{G}{0} ;; 0 \cdot G ;; G^{G^{G^G}} ;; \text{the answer to the question}
O ;; G \text{ (or O)} ;; \gcd(G, G) ;; \max(G, O)
"""

OTHERS = {
    "34": "35",
    "-7": "8",
    r"\frac{1}{2}": r"\frac{1}{3}",
    "(1,2)": "(3,4)",
    "[1,2)": "[3,4)",
    "5,6": "7,8",
    r"\{1,3\}": r"\{2,4\}",
    "2k+3": "2k+5",
    r"\sqrt{5}": r"\sqrt{7}",
    "C": "D",
    "east": "west",
    r"50\%": r"60\%",
    "y=2x+1": "y=3x+1",
}


def pairs_of(table):
    """[(answer, gold)] of a table's lines; a zero-width space is written \\u200b, to be seen."""
    lines = table.replace(r"\u200b", "\u200b").strip().splitlines()
    return [tuple(line.split(" | ")) for line in lines if not line.startswith("# ")]


def hedges_of(gold, other):
    """Responses that say the gold answer, but not as their only answer."""

    def fill(match):
        return gold if match[0] == "G" else other

    responses = [
        f"What is ${gold}$? It is ${gold}$.",
        rf"\boxed{{{gold}}} \boxed{{{other}}}",
        rf"\boxed{{{gold}}} or \boxed{{{other}",
        f"Answer: {gold}. Answer: {other}",
        rf"\boxed{{{other}}}, that is {gold}. Answer: {gold}",
    ]
    lines = HEDGES.replace(r"\u200b", "\u200b").strip().splitlines()
    for hedge in " ;; ".join(lines).split(" ;; "):
        responses.append(rf"\boxed{{{re.sub('[GO]', fill, hedge)}}}")
    return responses
