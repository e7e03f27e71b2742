"""Classes of gold queries."""

from __future__ import annotations

import pytest

from trimtab.sql.classes import CLASSES, query_classes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("query", "dialect", "classes"),
    [
        ("SELECT a FROM t", "sqlite", ""),
        ("SELECT a FROM t JOIN u ON t.a = u.a", "sqlite", "join"),
        ("SELECT a FROM t, u", "sqlite", "join"),
        ("SELECT a, count(*) FROM t GROUP BY a HAVING count(*) > 1", "sqlite", "group"),
        ("SELECT a FROM t WHERE b = (SELECT max(b) FROM t)", "sqlite", "nested"),
        ("SELECT a FROM (SELECT a FROM t) AS x", "sqlite", "nested"),
        ("WITH x AS (SELECT 1) SELECT * FROM x", "sqlite", "nested"),
        ("SELECT a FROM t UNION SELECT b FROM u", "sqlite", "set"),
        ("SELECT a FROM t UNION SELECT b FROM u EXCEPT SELECT c FROM v", "sqlite", "set"),
        ("(SELECT a FROM t) UNION (SELECT b FROM u) ORDER BY 1", "postgres", "set order"),
        ("SELECT a FROM t WHERE EXISTS (SELECT 1 FROM u UNION SELECT 2)", "sqlite", "nested set"),
        ("(SELECT a FROM t)", "sqlite", ""),
        ("SELECT a FROM t ORDER BY a LIMIT 1", "sqlite", "order"),
        ("SELECT a FROM t LIMIT 1", "sqlite", "order"),
        ("SELECT TOP 3 a FROM t", "tsql", "order"),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", "sqlite", ""),
        ("SELECT a FROM t WHERE d > '2024-01-01'", "sqlite", "date"),
        ("SELECT a FROM t WHERE d > '2024-01'", "sqlite", "date"),
        ("SELECT a FROM t WHERE d > '2024-x'", "sqlite", ""),
        ("SELECT strftime('%Y', d) FROM t", "sqlite", "date"),
        ("SELECT julianday('now')", "sqlite", "date"),
        ("SELECT daytime, upper(updated) FROM t", "sqlite", ""),
        ("SELECT TO_DATE(d, 'YYYY') FROM t", "oracle", "date"),
        ("SELECT SYSDATE FROM dual", "oracle", "date"),
        ("SELECT ADD_MONTHS(d, 1) FROM t", "oracle", "date"),
        ("SELECT DATE_FORMAT(d, '%Y') FROM t", "mysql", "date"),
        ("SELECT YEAR(d) FROM t", "mysql", "date"),
        ("SELECT NOW()", "mysql", "date"),
        ("SELECT GETDATE()", "tsql", "date"),
        ("SELECT a FROM t WHERE d > CURRENT_DATE - INTERVAL '1 day'", "postgres", "date"),
        ("SELECT d::date FROM t", "postgres", "date"),
        ("SELECT date_trunc('month', d), age(d, e) FROM t", "postgres", "date"),
        ("SELECT to_char(d, 'YYYY-MM') FROM t", "postgres", "date"),
        ("SELECT to_char(n, '999') FROM t", "postgres", ""),
        ("SELECT 名称 FROM 表 JOIN 乙 ON 表.编号 = 乙.编号 WHERE 有效期 < '2025-06-15' ORDER BY 名称", "postgres", "join order date"),
        ("SELECT a FRM", "sqlite", ""),
    ],
)  # fmt: skip
def test_classes(query: str, dialect: str, classes: str) -> None:
    assert query_classes(query, dialect) == tuple(classes.split())
    assert set(classes.split()) <= set(CLASSES)
